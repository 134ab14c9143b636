"""Kills every long command, fills its disk, or makes it read-only, and counts what is lost.

    python tests/benchmarks/kills.py                     # 300 kills, about half an hour on two cores
    python tests/benchmarks/kills.py --trials 20 --only sample push
    python tests/benchmarks/kills.py --trouble full      # disks of a few MB, as root
    python tests/benchmarks/kills.py --trouble read-only

Each trial starts from the same folder, which holds things of the user's own. The command is killed there once or twice,
at random moments or at events in the file system, or runs out of room at a random place, and is then run to its end.
The folder must be what an undisturbed run makes of it, to the byte but for times: a trial in which a file differs, is
missing or is left over counts as bad, as do a traceback and a rerun that fails. Pushes go to a Hub on loopback and are
compared by what it holds then. Everything runs in processes forked off this one, in a temporary folder.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
TOKEN = "hf_" + "kill" * 8
LIMIT = 300  # seconds that any run may take

UNET = {"model_channels": 32, "channel_mult": [1], "num_res_blocks": 1, "attention_resolutions": [], "num_heads": 4}
LOOP = {"train_batch_size": 4, "max_train_steps": 6, "checkpointing_steps": 2, "validation_steps": 0,
        "report_to": "none", "ema_decay": 0.9}  # fmt: skip
SAMPLING = {"num_train_timesteps": 25, "num_inference_steps": 2}
RECIPE = {
    "data": {"train_data_dir": "photos", "resolution": [8]},
    "judge": {**UNET, **LOOP, "noisy": False, "pool": "adaptive"},
    "classifier": {**UNET, **LOOP, "pool": "adaptive", "num_train_timesteps": 25},
    "diffusion": {**UNET, **LOOP, **SAMPLING, "label_dropout": 0.5},
    "upscaler": {**UNET, **LOOP, **SAMPLING, "low_resolution": 4},
    "vae": {**LOOP, "latent_dim": 4, "model_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1},
    "report": {"num_images": 12, "guidance_scales": [0.0, 2.0], "conditional_scales": [], "num_inference_steps": 2},
}


def convert_command(output: str) -> list[str]:
    """Of the reference models' checkpoints."""
    flags = "--image_size 16 --diffusion_steps 1000 --noise_schedule linear --num_head_channels 16 "
    files = ["--checkpoint", "unet.pt", "--classifier", "guide.pt"]
    return [
        "convert",
        *files,
        f"--flags={flags}--use_new_attention_order True --classifier_num_head_channels 16",
        "--output",
        output,
    ]


@dataclass
class Scenario:
    """A command, in the folder that it starts from.

    Attributes:
        name (`str`): What it is called in the table.
        command (`list[str]`): `train`, `train_diffusion` ... or a command of `hf-guided`, with its flags.
        processes (`int`): How many run it together.
        prepare (`Callable`): What a user does in the folder before, beside what all scenarios share.
    """

    name: str
    command: list[str]
    processes: int = 1
    prepare: Callable[[], None] = lambda: None

    @property
    def is_push(self) -> bool:
        return self.command[0] == "push"


def make_own_files() -> None:
    """What a user does in a finished folder."""
    from hf_guided.evaluation.sweep import save_choice

    folder = Path("out/pipeline")
    (folder / "notes.txt").write_text("mine")
    (folder / "unet" / "mine.txt").write_text("mine, too")
    card = folder / "README.md"
    card.write_text(card.read_text() + "\n## Words of my own\n\nkept\n")
    save_choice(folder, {"num_inference_steps": 1, "guidance_scale": 0.5})


def forget(*names: str) -> Callable[[], None]:
    def prepare() -> None:
        for name in names:
            shutil.rmtree(name)

    return prepare


def edit_on_the_hub() -> None:
    """An older push, whose card was edited on the Hub since; then the folder changes."""
    from huggingface_hub import HfApi, hf_hub_download

    from hf_guided.hub import push_folder

    repo_id = os.environ["KILLS_REPO"]
    push_folder("out/pipeline", repo_id)
    card = Path(hf_hub_download(repo_id, "README.md")).read_text()
    edited = card + "\n## Words on the Hub\n\nkept\n"
    HfApi().upload_file(path_or_fileobj=edited.encode(), path_in_repo="README.md", repo_id=repo_id)
    (Path("out/pipeline") / "grid.png").write_bytes(Path("out/judge/model/config.json").read_bytes())


PIPELINE, JUDGE, UPSCALER = "out/pipeline", "judge=out/judge/model", "out/upscaler/pipeline"
MEASURING = ["--features", JUDGE, "--batch_size", "4"]
SCENARIOS = [
    Scenario("train", ["train", "--output_dir", "new"]),
    Scenario("train again", ["train", "--output_dir", "out"], prepare=make_own_files),
    Scenario("train on", ["train", "--output_dir", "out", "--max_train_steps", "8"], prepare=make_own_files),
    Scenario("train, two", ["train_diffusion", "--output_dir", "new"], processes=2),
    Scenario("sample .npz", ["sample", PIPELINE, "--labels", "all", "--num_images", "40", "--batch_size", "4",
                             "--output", "samples.npz"]),
    Scenario("sample folder", ["sample", PIPELINE, "--num_images", "40", "--batch_size", "4", "--output", "samples/",
                               "--labels", "apple", "cherry"]),
    Scenario("evaluate", ["evaluate", PIPELINE, "photos", "--num_images", "24", *MEASURING, "--output", "measured",
                          "--save_statistics", "real.npz", "--held_out", "more"]),
    Scenario("sweep", ["sweep", PIPELINE, "photos", "--num_images", "12", "--scales", "0,1,3", "--seeds", "0,1",
                       *MEASURING, "--output", "swept"]),
    Scenario("compare", ["compare", "--data", "photos", "--resolution", "8", "--recipe", "recipe.yaml", "--families",
                         "vae,diffusion", "--budget", "4steps", "--seeds", "0", "--num_images", "12", "--scales", "0",
                         "--features", JUDGE, "--output", "compared"]),
    Scenario("upscale", ["upscale", UPSCALER, "small.npz", "--batch_size", "4", "--output", "large.npz"]),
    Scenario("inspect", ["inspect-classifier", PIPELINE, "photos", "--num_images", "16", "--output", "inspected.png"]),
    Scenario("train upscaler", ["train_upscaler", "--output_dir", "new"]),
    Scenario("convert", convert_command("converted")),
    Scenario("export", ["convert", "adm", "--to", "openai", "--output", "back.pt", "--classifier", "guide-back.pt"]),
    Scenario("push", ["push", PIPELINE], prepare=edit_on_the_hub),
]  # fmt: skip


def run(scenario: Scenario) -> None:
    """Runs the command here, as a process of its own would."""
    name, *flags = scenario.command
    if name.startswith("train"):
        import importlib

        from hf_guided.training.arguments import run_script

        module = importlib.import_module(f"hf_guided.training.{name}")
        sys.argv = [f"{name}.py", "--recipe", "recipe.yaml", *flags]
        run_script(module.main)
    else:
        from hf_guided.cli import main

        main([name, *flags, *([os.environ["KILLS_REPO"]] if scenario.is_push else [])])


def fork(work: Callable[[], None], log: Path, kill_at: int | None = None) -> int:
    """A process that does some work in the current folder, killed at the so manieth event of the file system.

    Its output is appended to a file, and the number of its events, if it comes to an end, written beside that.
    """
    child = os.fork()
    if child:
        return child
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    events = watch_files(Path.cwd(), kill_at)
    try:
        work()
        status: Any = 0
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 99
    num_events = events["seen"]
    sys.stdout.flush()
    sys.stderr.flush()
    log.with_suffix(".events").write_text(str(num_events))
    os._exit(status or 0)


def watch_files(folder: Path, kill_at: int | None) -> dict[str, int]:
    """Counts what this process opens for writing, renames, links and removes below a folder."""
    events = {"seen": 0}
    removals = {"os.remove", "os.rmdir"}  # which name files without their folder, where a whole tree is removed

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            if not arguments[2] & (os.O_WRONLY | os.O_RDWR):
                return
        elif event not in {"os.rename", "os.mkdir", "os.link", *removals}:
            return
        if event in removals or os.path.abspath(os.fsdecode(arguments[0])).startswith(str(folder)):
            events["seen"] += 1
            if events["seen"] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def careful(event: str, arguments: tuple) -> None:
        with suppress(TypeError):  # descriptors instead of names
            hook(event, arguments)

    sys.addaudithook(careful)
    return events


def wait(children: list[int], seconds: float) -> dict[int, int | None]:
    """Their exit statuses, once all have ended; `None` for those that have not by then."""
    until, statuses = time.monotonic() + seconds, dict.fromkeys(children)
    while None in statuses.values() and time.monotonic() < until:
        for child in (child for child, status in statuses.items() if status is None):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                statuses[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.003)
    return statuses


def ended(children: list[int]) -> list[int | None]:
    """Their exit statuses, once all have ended."""
    return list(wait(children, LIMIT).values())


def launch(scenario: Scenario, log: Path, kill_at: int | None = None) -> list[int]:
    """Starts the command's processes; of several, the last is the one to be killed at an event."""
    if scenario.processes == 1:
        return [fork(partial(run, scenario), log, kill_at)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def rank(index: int) -> None:
        os.environ.update(RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE=str(scenario.processes))
        os.environ.update(LOCAL_WORLD_SIZE=str(scenario.processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        run(scenario)

    last = scenario.processes - 1
    return [fork(partial(rank, i), log, kill_at if i == last else None) for i in range(scenario.processes)]


def start_over(scenario: Scenario, template: Path, folder: Path, repo_id: str) -> None:
    """The folder as the command finds it first."""
    shutil.copytree(template, folder, symlinks=True, dirs_exist_ok=True)
    os.chdir(folder)
    os.environ["KILLS_REPO"] = repo_id
    if ended([fork(scenario.prepare, folder.with_suffix(".prepare.log"))]) != [0]:
        raise RuntimeError(folder.with_suffix(".prepare.log").read_text())


def outcome(scenario: Scenario, folder: Path, repo_id: str) -> dict[str, str]:
    """A digest of each file of the folder, and of the repository if it was pushed, without times."""
    found = {path.relative_to(folder).as_posix(): digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    found |= {f"{path.relative_to(folder)}/": "" for path in folder.rglob("*") if path.is_dir()}
    if scenario.is_push:
        copy = folder.with_suffix(".hub")
        ended([fork(partial(download, repo_id, copy), folder.with_suffix(".download.log"))])
        for path in copy.rglob("*"):
            if path.is_file() and ".cache" not in path.parts:
                found[f"hub:{path.relative_to(copy)}"] = digest(path, repo_id)
    return found


def download(repo_id: str, folder: Path) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download(repo_id, local_dir=folder)


def digest(path: Path, repo_id: str = "") -> str:
    content = path.read_bytes()
    if path.suffix == ".json" or path.name == "README.md":
        text = content.decode().replace(repo_id or "\0", "REPO")
        text = re.sub(r"<!-- hf-guided: .* -->", "", text)  # digests of what tells of time
        text = re.sub(r"in \d+\.\d+ (minutes|hours)", "in TIME", text)
        text = re.sub(r'("\w*seconds\w*"): (?:-?[\d.e-]+|\{[^}]*\})', r"\1: TIME", text)
        content = re.sub(r'"(digests|run|files)": (\{[^}]*\}|\[[^]]*\]|"[^"]*")', "", text).encode()
    if path.name.startswith("comparison.") or path.name == "curves.png" or path.name.startswith("random_states_"):
        content = b""  # tell of time all over, or of generators that nothing draws from
    if path.suffix == ".json" and b'"losses"' in content:
        content = b""
    return hashlib.sha256(content).hexdigest()[:16]


@dataclass
class Whole:
    """An undisturbed run: its time, its events in the file system, the bytes that it adds, and what it leaves."""

    seconds: float
    num_events: int
    num_bytes: int
    files: dict[str, str]


@dataclass
class Shared:
    """What all trials start from and are held against."""

    root: Path
    template: Path
    trouble: str
    undisturbed: dict[str, Whole]


Trouble = tuple[list[str], list[str]]  # what was done, and what was bad about how the command took it


def kill(scenario: Scenario, shared: Shared, folder: Path, log: Path, chance: random.Random) -> Trouble:
    """Kills the command, of several processes the last, once or twice."""
    whole = shared.undisturbed[scenario.name]
    kills, bad = [], []
    for _ in range(chance.choice([1, 1, 2])):
        at_event = chance.random() < 0.6
        event = chance.randint(1, whole.num_events) if at_event else None
        moment = chance.uniform(0.05, 1) * whole.seconds
        children = launch(scenario, log, event)
        statuses = dict.fromkeys(children)
        if not at_event:
            statuses = wait(children, moment)
            if statuses[children[-1]] is None:
                os.kill(children[-1], signal.SIGKILL)
        statuses |= wait([child for child in children if statuses[child] is None], LIMIT)
        for child in (child for child in children if statuses[child] is None):
            bad.append("a process outlived its killed peer")
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        if -signal.SIGKILL in statuses.values():
            kills.append(f"event {event}" if at_event else f"{moment:.2f} s")
    return kills, bad


def fill_disk(scenario: Scenario, shared: Shared, folder: Path, log: Path, chance: random.Random) -> Trouble:
    """Leaves some room, less than the command needs, and then gives it enough."""
    used = shutil.disk_usage(folder).used
    room = int(chance.random() * shared.undisturbed[scenario.name].num_bytes)
    mount(folder, f"remount,size={used + room}")
    bad = fails_well(scenario, log)
    mount(folder, "remount,size=1g")
    return [f"{room:,} bytes of room"], bad


def forbid_writing(scenario: Scenario, shared: Shared, folder: Path, log: Path, chance: random.Random) -> Trouble:
    """Makes the disk read-only, and then writable again."""
    mount(folder, "remount,ro")
    bad = fails_well(scenario, log)
    mount(folder, "remount,rw")
    return ["read-only"], bad


def fails_well(scenario: Scenario, log: Path) -> list[str]:
    """What is wrong with how the command ends."""
    before = log.stat().st_size if log.is_file() else 0
    statuses = ended(launch(scenario, log))
    said = log.read_bytes()[before:].decode(errors="replace")
    if any(statuses) and "error: " not in said:  # after a progress bar, perhaps on its line
        return [f"it ended with {statuses} and without a sentence"]
    return []


def mount(folder: Path, options: str) -> None:
    """A disk of its own in memory."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)


def trial(scenario: Scenario, index: int, shared: Shared, seed: int) -> dict[str, Any]:
    """Kills the command once or twice, lets it end, and tells how what it leaves differs from an undisturbed run."""
    chance = random.Random(f"{seed} {scenario.name} {index}")
    expected = shared.undisturbed[scenario.name].files
    name = f"{re.sub(r'[^a-z0-9]+', '-', scenario.name)}-{index}"
    folder, repo_id = shared.root / "trials" / name, f"me/{name}"
    log = folder.with_suffix(".log")
    if shared.trouble != "kill":
        folder.mkdir()
        mount(folder, "size=1g")
    start_over(scenario, shared.template, folder, repo_id)
    disturb = {"kill": kill, "full": fill_disk, "read-only": forbid_writing}[shared.trouble]
    troubles, bad = disturb(scenario, shared, folder, log, chance)
    statuses = ended(launch(scenario, log))
    if any(statuses):
        bad.append(f"the rerun ended with {statuses}")
    found = outcome(scenario, folder, repo_id)
    for path in sorted({*found, *expected}):
        if found.get(path) != expected.get(path):
            what = "is left over" if path not in expected else "is missing" if path not in found else "differs"
            bad.append(f"{path} {what}")
    said = log.read_text(errors="replace")
    if "Traceback" in said:
        bad.append("a traceback")
    os.chdir(shared.root)
    if shared.trouble != "kill":
        subprocess.run(["umount", folder], check=True)
    if not bad:
        shutil.rmtree(folder)
    return {"scenario": scenario.name, "index": index, "troubles": troubles, "bad": bad, "folder": name}


def undisturbed(scenario: Scenario, shared: Shared) -> Whole:
    """A whole run; twice, to be sure that it always leaves the same."""
    found = []
    for index in range(2):
        name = f"{re.sub(r'[^a-z0-9]+', '-', scenario.name)}-whole-{index}"
        folder, repo_id = shared.root / "trials" / name, f"me/{name}"
        start_over(scenario, shared.template, folder, repo_id)
        log, started, before = folder.with_suffix(".log"), time.monotonic(), num_bytes(folder)
        statuses = ended(launch(scenario, log))
        seconds = time.monotonic() - started
        if any(statuses):
            raise RuntimeError(f"{scenario.name} ends with {statuses}: {log.read_text()[-3000:]}")
        num_events, added = int(log.with_suffix(".events").read_text()), num_bytes(folder) - before
        found.append(Whole(seconds, num_events, added, outcome(scenario, folder, repo_id)))
        os.chdir(shared.root)
    first, second = (whole.files for whole in found)
    differing = [path for path in sorted({*first, *second}) if first.get(path) != second.get(path)]
    if differing:
        raise RuntimeError(f"Two undisturbed runs of {scenario.name} differ in {', '.join(differing)}.")
    return found[0]


def num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def make_template(folder: Path) -> None:
    """Pictures, a finished training, and checkpoints of the published code, small as can be."""
    import numpy as np
    import torch
    import yaml
    from PIL import Image

    random_pixels = np.random.default_rng(0)
    for parent, count in (("photos", 24), ("more", 8)):
        for label, name in enumerate(["apple", "banana", "cherry"]):
            (folder / parent / name).mkdir(parents=True)
            for i in range(count):
                pixels = random_pixels.integers(0, 120, (9, 9, 3), dtype=np.uint8)
                pixels[..., label] += 120
                Image.fromarray(pixels).save(folder / parent / name / f"{i}.png")
    os.chdir(folder)
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    log = folder.with_suffix(".log")

    def checkpoints() -> None:
        sys.path[:0] = [str(TESTS), str(TESTS / "conversion")]
        import conftest
        from safetensors import safe_open

        for name, path in (("sampler_unet", "unet.pt"), ("sampler_classifier", "guide.pt")):
            with safe_open(conftest.REFERENCE / f"{name}.safetensors", "pt") as file:
                torch.save(conftest.draw_weights(json.loads(file.metadata()["weights"])), path)

    np.savez("small.npz", random_pixels.integers(0, 256, (12, 4, 4, 3), dtype=np.uint8), np.arange(12) % 3)
    commands = [["train", "--output_dir", "out"], ["train_upscaler", "--output_dir", "out"], convert_command("adm")]
    for work in (checkpoints, *(partial(run, Scenario("", command)) for command in commands)):
        if ended([fork(work, log)]) != [0]:
            raise RuntimeError(log.read_text()[-3000:])


def serve_hub() -> None:
    """A Hub on loopback, until its standard input ends."""
    sys.path.insert(0, str(TESTS))
    from hub_server import HubServer, User

    with HubServer({TOKEN: User("me")}) as hub:
        print(hub.endpoint, flush=True)
        sys.stdin.read()


def main() -> None:
    if sys.argv[1:] == ["serve-hub"]:
        return serve_hub()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=300, help="in all, assigned to the scenarios in turn")
    parser.add_argument("--trouble", choices=["kill", "full", "read-only"], default="kill")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="scenarios whose names begin so")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="trials at once")
    parser.add_argument("--output", type=Path, help="a .json file for what was found")
    args = parser.parse_args()
    scenarios = [s for s in SCENARIOS if not args.only or s.name.startswith(tuple(args.only))]
    root = Path(tempfile.mkdtemp(prefix="kills-"))
    (root / "trials").mkdir()
    hub = subprocess.Popen([sys.executable, __file__, "serve-hub"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    os.environ.update(
        HF_ENDPOINT=hub.stdout.readline().decode().strip(),  # type: ignore[union-attr]
        HF_HUB_DISABLE_XET="1", HF_TOKEN=TOKEN, HF_HOME=str(root / "home"), NO_PROXY="127.0.0.1",
        HF_HUB_DISABLE_TELEMETRY="1", ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false",
    )  # fmt: skip
    # Once, for all processes that are forked off: nothing here may start a thread.
    import hf_guided.cli
    import hf_guided.demo  # noqa: F401
    from hf_guided.training import train  # noqa: F401

    print(f"Works in {root}", flush=True)
    shared = Shared(root, root / "template", args.trouble, {})
    make_template(shared.template)
    for scenario in scenarios:
        whole = shared.undisturbed[scenario.name] = undisturbed(scenario, shared)
        what = f"{whole.seconds:.1f} s, {whole.num_events} events, {whole.num_bytes:,} bytes"
        print(f"{scenario.name}: {what}", flush=True)
    trials = [(scenarios[i % len(scenarios)], i // len(scenarios)) for i in range(args.trials)]
    workers = [
        fork_worker(trials[w :: args.workers], shared, args.seed, root / f"worker-{w}") for w in range(args.workers)
    ]
    for worker in workers:
        os.waitpid(worker, 0)
    rows = [json.loads(line) for w in range(args.workers) for line in (root / f"worker-{w}").read_text().splitlines()]
    report(scenarios, rows, len(trials))
    if args.output:
        args.output.write_text(json.dumps(rows, indent=2) + "\n")
    hub.kill()
    if len(rows) == len(trials) and not any(row["bad"] for row in rows):
        shutil.rmtree(root)
    else:
        raise SystemExit(f"What the bad ones left is in {root}.")


def fork_worker(trials: list[tuple[Scenario, int]], shared: Shared, seed: int, results: Path) -> int:
    """A process that makes some of the trials, one after the other."""
    child = os.fork()
    if child:
        return child
    try:
        with results.open("w") as file:
            for scenario, index in trials:
                row = trial(scenario, index, shared, seed)
                print(json.dumps(row), file=file, flush=True)
                if row["bad"]:
                    print(f"{row['folder']} ({', '.join(row['troubles'])}): {'; '.join(row['bad'][:5])}", flush=True)
    except BaseException:
        traceback.print_exc()
    os._exit(0)


def report(scenarios: list[Scenario], rows: list[dict[str, Any]], num_trials: int) -> None:
    print("| command | trials | troubles | bad |\n| --- | --- | --- | --- |")
    for scenario in [*scenarios, None]:
        of = [row for row in rows if scenario is None or row["scenario"] == scenario.name]
        count = sum(len(row["troubles"]) for row in of)
        name = "all" if scenario is None else scenario.name
        print(f"| {name} | {len(of)} | {count} | {sum(bool(row['bad']) for row in of)} |")
    if len(rows) < num_trials:
        print(f"{num_trials - len(rows)} trials were not made.")


if __name__ == "__main__":
    main()
