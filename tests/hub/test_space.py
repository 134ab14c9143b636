"""The Space: what is in its folder, and that it runs with nothing of this package but the copy there."""

import json
import re
import socket
import subprocess
import sys
import urllib.request
from importlib.metadata import PackageNotFoundError, version

import forked
import pytest
from hub_server import Commit, HubServer, User
from huggingface_hub import metadata_load

from hf_guided import ADMImageProcessor, ADMScheduler, ClassifierGuidedPipeline
from hf_guided.hub.space import write_space

TOKEN = "hf_read" + "Aa0" * 10
SMALL = {"sample_size": 8, "in_channels": 1, "attention_resolutions": ()}

# Runs app.py as the Hub does, where an editable install's finder cannot help out.
RUN = """
import runpy, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
sys.argv = ["app.py", *sys.argv[1:]]
import hf_guided
print(hf_guided.__file__, flush=True)
runpy.run_path("app.py", run_name="__main__")
"""


def test_a_space_describes_itself(tmp_path):
    folder = write_space(tmp_path / "space", model_id="ada/dots", judge_id='ada/"judge"')
    header = metadata_load(folder / "README.md")
    expected = {"sdk": "gradio", "sdk_version": version("gradio"), "app_file": "app.py", "pinned": False}
    expected |= {"title": "dots", "license": "apache-2.0", "models": ["ada/dots", 'ada/"judge"']}
    assert {name: header[name] for name in expected} == expected
    assert len(header["emoji"]) == 1
    lines = (folder / "requirements.txt").read_text().splitlines()
    assert {re.split(r"\W", line)[0] for line in lines} >= {"torch", "diffusers", "transformers", "gradio"}
    assert not [line for line in lines if re.match(r"pytest|selenium|datasets|hf-guided", line) or ";" in line]
    compile((folder / "app.py").read_text(), "app.py", "exec")  # whatever the names are

    (folder / "hf_guided/old.py").touch()
    write_space(folder, model_id="ada/dots", title="Dots")
    assert metadata_load(folder / "README.md")["title"] == "Dots"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    assert names >= {
        "hf_guided/demo/page.py",
        "hf_guided/demo/templates/page.css",
        "hf_guided/pipelines/pipeline_classifier_guided.py",
    }
    assert "hf_guided/old.py" not in names
    assert all(name.endswith((".py", ".jinja", ".css")) for name in names - {"README.md", "requirements.txt"})
    assert not [path for path in folder.rglob("*") if path.is_symlink() or path.name == "__pycache__"]


def test_a_flows_space_brings_what_a_flow_needs(tmp_path):
    space = write_space(tmp_path / "flow", model_id="ada/flow", model_class="FlowPipeline")
    lines = (space / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if line.startswith("normflows>=")]
    assert not [line for line in lines if re.match(r"datasets|matplotlib|scikit-learn", line)]
    readme = " ".join((space / "README.md").read_text().split())
    assert (
        "samples of [ada/flow](https://huggingface.co/ada/flow), and the same noise at several temperatures" in readme
    )
    assert "classifier-guidance" not in metadata_load(space / "README.md")["tags"]
    for name in ("baselines/flow.py", "baselines/sizes.py", "pipelines/pipeline_flow.py"):
        assert (space / "hf_guided" / name).is_file(), name
    write_space(space, model_id="ada/dots")
    assert "normflows" not in (space / "requirements.txt").read_text()
    assert "classifier-guidance" in metadata_load(space / "README.md")["tags"]


def test_a_space_runs_with_its_own_copy_and_a_private_model(tiny_unet, tiny_classifier, tmp_path):
    classes = {"num_labels": 2, "id2label": {0: "up", 1: "down"}}
    unet = tiny_unet(**SMALL, channel_mult=(1,), out_channels=2, num_class_embeds=2)
    classifier = tiny_classifier(**SMALL, channel_mult=[1], **classes)
    defaults = {"num_inference_steps": 3}
    pipe = ClassifierGuidedPipeline(unet, ADMScheduler(solver_order=2), classifier, sampling_defaults=defaults)
    pipe.save_pretrained(tmp_path / "dots")
    tiny_classifier(**SMALL, channel_mult=[1, 1], **classes).save_pretrained(tmp_path / "judge")
    ADMImageProcessor(size={"height": 8, "width": 8}, num_channels=1).save_pretrained(tmp_path / "judge")
    space = write_space(tmp_path / "space", model_id="ada/dots", judge_id="ada/judge")
    with HubServer({TOKEN: User("ada", role="read")}) as hub, socket.socket() as free:
        for name in ("dots", "judge"):
            root = tmp_path / name
            files = {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}
            hub.add_repo(f"ada/{name}", private=True).add("main", Commit("Models", files, frozenset()))
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/"
        free.close()
        command = [sys.executable, "-c", RUN, "--host", "127.0.0.1", "--port", url.rpartition(":")[2].strip("/")]
        with (tmp_path / "errors").open("w") as errors:
            process = forked.Popen(
                command,
                cwd=space,
                env=hub.environment(tmp_path / "home", TOKEN),
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        try:
            assert process.stdout.readline().strip() == str(space / "hf_guided/__init__.py")
            told = process.stdout.readline().strip()
            assert told == f"The demo of ada/dots is at {url} until Ctrl-C.", (tmp_path / "errors").read_text()[-2000:]
            values = ["down", 2, 0, "SDE-DPM-Solver++(2M)", 3, 1.0, True]
            status, pictures = call(f"{url}gradio_api/call/sample", values)
            assert re.search(r"Classified correctly: [012] of 2", status)
            assert len(re.findall(r'src="data:image/png;base64,', pictures)) == 2
        finally:
            process.kill()
            process.wait()


def call(url, values):
    body, kind = json.dumps({"data": values}).encode(), {"Content-Type": "application/json"}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, body, kind), timeout=30) as response:
        event = json.load(response)["event_id"]
    with opener.open(f"{url}/{event}", timeout=30) as response:
        return json.loads(re.findall(r"event: complete\ndata: (.*)\n", response.read().decode())[0])


def test_a_space_needs_gradio(tmp_path, monkeypatch):
    import hf_guided.hub.space as module

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(module, "version", missing)
    with pytest.raises(ImportError, match=r'pip install "hf-guided\[demo\]"'):
        write_space(tmp_path / "space", model_id="ada/dots")
    assert not (tmp_path / "space").exists()
