"""Models by Hub id: downloaded once, used offline, interrupted, and every refusal in one sentence."""

import os
import re
import time
from pathlib import Path

import pytest
import torch

from ..hub_server import Repository
from . import graphs, models
from .graphs import node
from .server import GraphError

ID = "someone/tiny-flux"


def prompt(repo_id=ID, revision="main", seed=1):
    return graphs.sampled(graphs.four_bit("(none)", repo_id=repo_id, revision=revision), seed=seed, steps=1)


def only_load(**inputs):
    """Nothing but the loader runs."""
    loader = graphs.four_bit("(none)", **inputs)
    return {"load": loader, "info": node("DiRotQModelInfo", checkpoint="", limit=0, model=["load", 0])}


@pytest.fixture
def folder(client):
    return client.base / "models" / "diffusion_models"


@pytest.fixture
def online(hub, folder):
    """A Hub with one repository, running."""
    hub.requests.clear()
    hub.delay, hub.cut_after, hub.sent = 0.0, None, 0
    hub.repositories = {ID: Repository.of(folder / models.FLUX_4BIT)}
    hub.repositories[ID].files["README.md"] = b"# A model\n"
    with hub:
        yield hub


def reload(client):
    """Make ComfyUI forget what nodes have returned."""
    client.post("/free", {"unload_models": True, "free_memory": True})
    time.sleep(0.3)


def test_downloaded_once_then_used_offline(client, server, hub, online, folder):
    reference = graphs.saved_latent(client, client.run(graphs.sampled(graphs.four_bit(models.FLUX_4BIT), steps=1)))
    seen = [(value, of) for name, value, of in client.progress(prompt()) if name == "model"]
    size = sum(len(d) for n, d in online.repositories[ID].files.items() if n != "README.md")
    assert seen and seen[-1] == (size, size) and [v for v, _ in seen] == sorted(v for v, _ in seen)
    assert {Path(p).name for p, _ in online.downloads()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    target = folder / "someone--tiny-flux@main"
    assert target.name in client.object_info()["DiRotQLoadModel"]["input"]["required"]["model_name"][1]["options"]

    reload(client)
    online.requests.clear()
    found = graphs.saved_latent(client, client.run(prompt()))
    assert torch.equal(found, reference)
    assert not online.downloads() and len(online.requests) == 1

    hub.__exit__()
    reload(client)
    assert torch.equal(graphs.saved_latent(client, client.run(prompt())), reference)
    (line,) = [x for x in server.log().splitlines() if "the Hub cannot be reached" in x and str(target) in x]
    assert online.repositories[ID].commit[:12] in line
    # What is there in part is not taken for the whole.
    (target / "config.json").unlink()
    reload(client)
    with pytest.raises(GraphError, match="the Hub cannot be reached"):
        client.run(prompt())
    hub.__enter__()
    assert torch.equal(graphs.saved_latent(client, client.run(prompt())), reference)


def test_changed_files_are_read_again(client, online, folder):
    client.run(prompt())
    online.requests.clear()
    client.run(prompt(seed=5))
    assert not online.requests  # the loader's result was kept, though the files came after it was asked for
    os.utime(folder / "someone--tiny-flux@main" / "config.json")
    client.run(prompt(seed=6))
    assert online.requests
    online.requests.clear()
    client.run(prompt(seed=7))
    assert not online.requests


def test_a_first_download_is_kept(client, online):
    """Of a repository that is not there yet, in a graph whose model_name is of another machine, too."""
    online.repositories["someone/new"] = online.repositories[ID]
    graph = graphs.sampled(graphs.four_bit("of-another-machine.safetensors", repo_id="someone/new"), steps=1)
    client.run(graph)
    online.requests.clear()
    graph["latent"]["inputs"]["seed"] = 2
    client.run(graph)
    assert not online.requests


def test_values_that_the_graph_computes(client, server, online):
    """They are not known before it runs; what it loads is kept all the same."""
    loader = graphs.four_bit("of-another-machine.safetensors", repo_id=["id", 0], revision=["revision", 0])
    graph = graphs.sampled(loader, steps=1) | {
        "id": node("PrimitiveString", value=ID),
        "revision": node("PrimitiveString", value="main"),
    }
    client.run(graph)
    online.requests.clear()
    graph["latent"]["inputs"]["seed"] = 2
    client.run(graph)
    assert not online.requests and "has no attribute" not in server.log()
    graph["id"]["inputs"]["value"] = "someone/absent"
    with pytest.raises(GraphError, match="the Hub has no 'someone/absent'"):
        client.run(graph)


def test_a_new_commit_is_downloaded(client, online, folder):
    client.run(only_load(repo_id=ID))
    reload(client)
    online.requests.clear()
    files = online.repositories[ID].files
    online.repositories[ID] = Repository(files | {"config.json": files["config.json"] + b"\n"})
    client.run(only_load(repo_id=ID))
    assert {Path(p).name for p, _ in online.downloads()} == {"config.json"}
    commit = online.repositories[ID].commit
    client.run(only_load(repo_id=ID, revision=commit))
    assert (folder / f"someone--tiny-flux@{commit}").is_dir()


def test_two_commits_are_not_mixed(client, online, folder):
    client.run(only_load(repo_id=ID))
    files = online.repositories[ID].files
    weights = "diffusion_pytorch_model.safetensors"
    changed = {"config.json": files["config.json"] + b"\n\n", weights: files[weights] + b"!"}
    online.repositories[ID] = Repository(files | changed, lost=(weights,))
    for _ in range(2):
        reload(client)
        with pytest.raises(GraphError, match=f"^the Hub answered 404 when asked for '{ID}' at revision 'main'$"):
            client.run(only_load(repo_id=ID))
    online.repositories[ID] = Repository(files)
    client.run(only_load(repo_id=ID))


@pytest.fixture
def large(online, folder):
    """A repository whose file is larger than the 10 MiB that come in one piece."""
    online.repositories["someone/large"] = Repository.of(folder / models.PIXART_4BIT)
    return "someone/large"


def test_a_broken_connection_is_resumed(client, online, large):
    online.cut_after = 12 << 20
    client.run(only_load(repo_id=large))
    ranges = [r for _, r in online.downloads(".safetensors")]
    assert ranges[0] == "" and ranges[1].startswith("bytes=") and ranges[1] != "bytes=0-"


def test_interrupted(client, online, large, folder):
    """Files that were complete are kept, the other leaves nothing, and the next prompt fetches it."""
    prompt = only_load(repo_id=large, revision=online.repositories[large].commit)
    online.delay = 0.005
    number = client.queue(prompt)
    deadline = time.monotonic() + 30
    while online.sent < 5 << 20 and time.monotonic() < deadline:
        time.sleep(0.05)
    client.interrupt()
    with pytest.raises(GraphError, match="interrupted"):
        client.wait(number)
    target = folder / f"someone--large@{online.repositories[large].commit}"
    assert {f.name for f in target.rglob("*") if f.stat().st_size > 1 << 20} == set()
    online.delay = 0.0
    online.requests.clear()
    client.run(prompt)
    assert [(Path(p).suffix, r) for p, r in online.downloads()] == [(".safetensors", "")]


def test_a_single_file(client, online, folder):
    online.repositories["someone/wrong"] = Repository({"model.safetensors": (folder / models.FLUX).read_bytes()})
    with pytest.raises(GraphError, match=r"someone--wrong@main/model.safetensors is not a DiRotQ checkpoint"):
        client.run(only_load(repo_id="someone/wrong"))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"repo_id": "someone/absent"}, "the Hub has no 'someone/absent', or it is private and you are not logged in"),
        ({"repo_id": ID, "revision": "v9"}, f"the Hub has '{ID}', but no revision 'v9'"),
        ({"repo_id": "someone/gated"}, "'someone/gated' is gated: accept its licence on the Hub and log in .*"),
        ({"repo_id": "no slash"}, "'no slash' is no Hub id; it must look like 'owner/name'"),
        ({"repo_id": "../up"}, r"'\.\./up' is no Hub id; it must look like 'owner/name'"),
        ({"repo_id": ID, "revision": r"..\up"}, "'.*' is no revision; give the name of a branch or tag, or a commit"),
        ({"repo_id": "someone/dense"}, "'someone/dense' is not a DiRotQ checkpoint: .* no quantization_config .*"),
        ({"repo_id": "someone/empty"}, "'someone/empty' at revision 'main' has no config.json and no single file; .*"),
        ({"repo_id": "someone/several"}, r".* has several single files \(a.safetensors, b.safetensors\); .*"),
    ],
)
def test_one_sentence(client, online, inputs, message):
    dense = {"config.json": b"{}", "diffusion_pytorch_model.safetensors": b"0" * 99}
    online.repositories |= {
        "someone/gated": Repository(dense, gated=True),
        "someone/dense": Repository(dense),
        "someone/empty": Repository({"README.md": b""}),
        "someone/several": Repository({"a.safetensors": b"0", "b.safetensors": b"0"}),
    }
    with pytest.raises(GraphError) as failed:
        client.run(only_load(**inputs))
    assert failed.value.node == "DiRotQLoadModel"
    found = str(failed.value)
    assert re.fullmatch(message, found), found
    assert not online.downloads(".safetensors")


def test_unreachable(client, hub):
    hub.repositories = {}
    with pytest.raises(GraphError, match=r"could not download '.*': the Hub cannot be reached \(.*refused.*\)$"):
        client.run(only_load(repo_id="someone/else"))
