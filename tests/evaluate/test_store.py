"""Results on disk: whatever a kill leaves, what was finished is there, and nothing that was not."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dirotq.dirotq_core.evaluate.store import Results


def test_a_value_belongs_to_its_stamp(tmp_path):
    results = Results(tmp_path, "psnr")
    with results.writing() as put:
        put("a", "1", 0.1)
        put("a", "2", [float("inf"), "\u2028é\n"])
    again = Results(tmp_path, "psnr")
    assert again.get("a", "2") == [float("inf"), "\u2028é\n"] == results.get("a", "2")
    assert again.get("a", "1") == 0.1 and again.get("a", "3") is None and again.get("b", "2") is None


def test_every_process_writes_a_file_of_its_own_and_reads_all(tmp_path):
    for rank in range(3):
        with Results(tmp_path, "psnr", rank).writing() as put:
            put(f"k{rank}", "", rank)
    with Results(tmp_path, "psnr.x").writing() as put:
        put("k0", "", 9)
    assert [Results(tmp_path, "psnr", 1).get(f"k{rank}", "") for rank in range(3)] == [0, 1, 2]


def test_files_of_more_processes_hide_nothing_newer(tmp_path):
    """Two processes wrote, then one alone wrote anew of other pictures: its file is read before the old ones."""
    for rank in range(2):
        with Results(tmp_path, "psnr", rank).writing() as put:
            put("a", "old", 1.0)
    with Results(tmp_path, "psnr").writing() as put:
        put("a", "new", 2.0)
    assert [Results(tmp_path, "psnr").get("a", stamp) for stamp in ("old", "new")] == [1.0, 2.0]


def test_a_line_per_value_even_after_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt), Results(tmp_path, "x").writing() as put:
        put("a", "", 1)
        raise KeyboardInterrupt
    assert Results(tmp_path, "x").get("a", "") == 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=5), st.integers(min_value=0, max_value=300))
def test_cut_anywhere(tmp_path_factory, values, cut):
    """Of a file that ends anywhere the whole lines are there, to the last bit; then it is written on."""
    folder = tmp_path_factory.mktemp("cut")
    results = Results(folder, "x")
    with results.writing() as put:
        for i, value in enumerate(values):
            put(str(i), "s", value)
    data = results.file.read_bytes()
    results.file.write_bytes(data[:cut])
    again = Results(folder, "x")
    whole = data[:cut].count(b"\n") + (cut < len(data) and data[cut : cut + 1] == b"\n")
    assert [again.get(str(i), "s") for i in range(whole)] == values[:whole]
    assert all(again.get(str(i), "s") is None for i in range(whole, len(values)))
    with again.writing() as put:
        put("new", "s", 7)
    assert Results(folder, "x").get("new", "s") == 7
    assert [Results(folder, "x").get(str(i), "s") for i in range(whole)] == values[:whole]
