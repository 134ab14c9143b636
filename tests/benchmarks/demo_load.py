"""Many clients at once on the demo of a tiny pipeline: how long each waits, and what is computed for those who leave.

    python tests/benchmarks/demo_load.py [--seconds 40]

Each client has its own address of this machine (127.0.1.1, ...). Twelve ask again and again and wait for the answers.
Four leave in the middle of sampling, two ask for comparisons and never read them, and two flood the routes with calls
that are refused, more than their share of the queue, and large bodies. A step takes 20 ms, more than the time until a
leaving is noticed. A client that leaves has its own number of images, which tells its steps from those of the others.

It fails if a client that waits gets no samples within `BOUND` times what they take alone, or less than half of the
answers that the median one gets; or if more than one step begins for a request after its client has left.
"""

import argparse
import http.client
import json
import logging
import os
import statistics
import sys
import threading
import time
from collections import Counter, defaultdict

os.environ["NO_PROXY"] = "127.0.0.1"

import torch

from hf_guided import (
    ADMClassifierConfig,
    ADMForImageClassification,
    ADMScheduler,
    ADMUNet2DModel,
    ClassifierGuidedPipeline,
)
from hf_guided.demo.gate import SECONDS_TO_LISTEN
from hf_guided.demo.page import build_demo, launch_demo

PATIENT, LEAVING, UNREAD, FLOODING = 12, 4, 2, 2
SECONDS_OF_A_STEP = 0.02
BOUND = 2 * (PATIENT + LEAVING + UNREAD + FLOODING)
PORT = 7961


def tiny_pipeline() -> ClassifierGuidedPipeline:
    torch.manual_seed(0)
    names = {0: "zero", 1: "one", 2: "two"}
    shape = {"sample_size": 8, "in_channels": 1, "model_channels": 32, "channel_mult": (1,), "num_res_blocks": 1}
    shape |= {"attention_resolutions": (), "attention_head_dim": 16}
    unet = ADMUNet2DModel(**shape, out_channels=2, num_class_embeds=3, null_class_label=True)
    classifier = ADMForImageClassification(ADMClassifierConfig(**shape, num_labels=3, id2label=names))
    defaults = {"num_inference_steps": 10, "guidance_scale": 1.0}
    return ClassifierGuidedPipeline(unet, ADMScheduler(), classifier, id2label=names, sampling_defaults=defaults)


class Client:
    """One of those who ask, from an address of its own."""

    def __init__(self, number: int):
        self.address = f"127.0.1.{number + 1}"
        self.session = f"client-{number}"

    def send(self, method: str, route: str, body: bytes | None = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", PORT, 300, source_address=(self.address, 0))
        connection.request(method, f"/gradio_api/{route}", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.connection = connection
        return response

    def post(self, route: str, body: object) -> tuple[int, dict]:
        with self.send("POST", route, json.dumps(body).encode()) as response:
            return response.status, json.loads(response.read())

    def begin(self, name: str, *values: object) -> str:
        status, told = self.post(f"call/{name}", {"data": values, "session_hash": self.session})
        return told["event_id"] if status == 200 else f"{status}: {told['detail']}"


class Load:
    """The clients, and what became of them."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds
        self.waits: dict[str, list[float]] = defaultdict(list)
        self.problems: list[str] = []
        self.statuses: dict[str, Counter[int]] = defaultdict(Counter)
        self.steps: list[tuple[float, int]] = []  # when, of how many images
        self.left: dict[int, list[tuple[float, float]]] = defaultdict(list)  # by number of images: until it asked again
        self.unread = 0

    def on_step(self, _: object, arguments: tuple) -> None:
        self.steps.append((time.monotonic(), len(arguments[0])))
        time.sleep(SECONDS_OF_A_STEP)

    def is_over(self) -> bool:
        return time.monotonic() > self.end

    def patient(self, number: int) -> None:
        client = Client(number)
        while not self.waits[client.address] or not self.is_over():
            began = time.monotonic()
            event = client.begin("sample", "two", 1 + number % 4, number, "DDPM, as published", 8, 1.0, True)
            with client.send("GET", f"call/sample/{event}") as response:
                text = response.read().decode()
            self.waits[client.address].append(time.monotonic() - began)
            if "event: complete" not in text or "Done in" not in text:
                self.problems.append(f"{client.address} was told {event} {text[-200:]}")

    def leaving(self, number: int) -> None:
        client, images = Client(number), number - PATIENT + 5
        while not self.is_over():
            kind, scales = [("sample", 1.0), ("compare", "0, 1, 2")][len(self.left[images]) % 2]
            event = client.begin(kind, "one", images, 0, "DDPM, as published", 200, scales, True)
            response = client.send("GET", f"call/{kind}/{event}")
            for line in response:
                if b"tep 1 of" in line:
                    break
            else:
                self.problems.append(f"{client.address} saw no step")
            time.sleep(0.2)
            response.close()
            response.connection.close()
            left = time.monotonic()
            time.sleep(1)
            self.left[images].append((left, time.monotonic()))

    def unreading(self, number: int) -> None:
        client, images = Client(number), number - PATIENT + 5
        while not self.is_over():
            asked = time.monotonic()
            for _ in range(3):  # of which the third is refused
                told = client.begin("compare", "one", images, 0, "DDPM, as published", 200, "0, 1, 2, 3, 4, 5", True)
                self.unread += ":" not in told
                self.statuses["a third request of a session"][int(told[:3]) if ":" in told else 200] += 1
            time.sleep(SECONDS_TO_LISTEN + 1)
            self.left[images].append((asked + SECONDS_TO_LISTEN, time.monotonic()))

    def flooding(self, number: int) -> None:
        client = Client(number)
        large = b"x" * 10**6
        values = ["two", 4, 0, "DDPM, as published", 100, 1.0, True]
        kinds = {
            "a direct call": lambda: client.post("run/sample", {"data": values})[0],
            "values that are not there": lambda: client.post("call/sample", {"data": []})[0],
            "an upload": lambda: client.post("upload", {})[0],
            "a body of 1 MB": lambda: client.send("POST", "call/sample", large).status,
            "a request without a session": lambda: client.post("call/sample", {"data": values})[0],
        }
        while not self.is_over():
            for kind, ask in kinds.items():
                self.statuses[kind][ask()] += 1
            time.sleep(0.2)

    def steps_after_leaving(self) -> list[int]:
        """For each request that was left, the steps that began afterwards and before its client asked again."""
        return [
            sum(n == images and left < when < again for when, n in self.steps)
            for images, times in self.left.items()
            for left, again in times
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable()
    pipe = tiny_pipeline()
    blocks = build_demo(pipe)
    launch_demo(blocks, port=PORT)
    load = Load(seconds=0)
    pipe.unet.register_forward_pre_hook(load.on_step)
    kinds = [load.patient] * PATIENT + [load.leaving] * LEAVING + [load.unreading] * UNREAD + [load.flooding] * FLOODING
    for _ in range(3):
        load.patient(0)
        alone = load.waits.pop("127.0.1.1")[0]
    print(f"alone, an answer takes {alone:.1f} s")
    load.end = time.monotonic() + arguments.seconds
    threads = [threading.Thread(target=kind, args=(i,), daemon=True) for i, kind in enumerate(kinds)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(arguments.seconds + 2 * BOUND * alone)
        assert not thread.is_alive(), "a client still waits"

    print("client        answers  longest wait  mean wait")
    for address, waits in sorted(load.waits.items(), key=lambda item: int(item[0].rpartition(".")[2])):
        print(f"{address:12}  {len(waits):7}  {max(waits):10.1f} s  {sum(waits) / len(waits):7.1f} s")
    after = load.steps_after_leaving()
    print(f"requests left in the middle or never read: {len(after)} times, {load.unread} of them never read")
    print(f"steps begun after the leaving: {dict(sorted(Counter(after).items()))} (steps: times)")
    for kind, statuses in load.statuses.items():
        print(f"{kind}: {dict(statuses)} (status: times)")
    for problem in load.problems:
        print(problem, file=sys.stderr)
    assert not load.problems
    assert len(load.waits) == PATIENT
    answers = [len(waits) for waits in load.waits.values()]
    assert min(answers) >= statistics.median(answers) / 2, "a client starved"
    assert max(map(max, load.waits.values())) < BOUND * alone, "a client waited too long"
    assert max(after) <= 1, "work went on for a client that had left"
    assert load.statuses["a direct call"].keys() == {404}
    print("none starved; no work went on")
    os._exit(0)


if __name__ == "__main__":
    main()
