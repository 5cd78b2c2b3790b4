"""`dirotq demo` from end to end, with few prompts."""

from PIL import Image

from dirotq.dirotq_core.cli import main


def test_demo(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path), "--prompts", "3", "--calibration", "4", "--device", "cpu"]) == 0
    table = (tmp_path / "table.txt").read_text()
    assert "pixart-sigma-tiny" in table and "flux-tiny" in table and table.strip() in capsys.readouterr().out
    sheet = Image.open(tmp_path / "contact-sheet.png")
    assert sheet.width > 3 * 128 and len(sheet.convert("RGB").getcolors(1 << 24)) > 100
    for line in table.splitlines()[2:]:
        psnr, ssim = float(line.split()[1]), float(line.split()[2])
        assert psnr > 20 and ssim > 0.8
