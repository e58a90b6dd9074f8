"""`unimm serve --ray` on this machine: two replicas answer as one server does, and one may die."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from tests.server.serving import Process, image_of, shows
from unimm.pipeline import UniMM

PROMPT = "a rocket on a purple background"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """Two replicas of the embedded model."""
    pytest.importorskip("ray", reason="needs Ray: pip install 'unimm[ray]'")
    folder = tmp_path_factory.mktemp("replicas")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # else they starve beside other tests
        with Process(folder, "--ray", "--replicas", "2", "--replica-cpus", "0.5") as process:
            yield process


def replicas() -> list[int]:
    """Process ids of the replicas."""
    listed = subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True, check=True).stdout
    lines = (line.split(maxsplit=1) for line in listed.splitlines())
    return [int(pid) for pid, words in lines if words.startswith("ray::ServeReplica:unimm:model")]


def alone(um: UniMM, seed: int) -> bytes:
    """The pixels of a drawing that the model makes by itself."""
    return um.draw(PROMPT, seed=seed)[0].tobytes()


def drawn(cluster: Process, seed: int) -> Any:
    """The events of a streamed drawing; an exception that ended it comes last."""
    events: list[Any] = []
    try:
        stream = cluster.client.openai().images.generate(
            model="embedded", prompt=PROMPT, stream=True, partial_images=3, extra_body={"seed": seed}
        )
        events.extend(stream)
    except Exception as error:
        events.append(error)
    return events


def test_each_answers_as_the_model_alone(cluster: Process, um: UniMM, scenes: list[Image.Image]) -> None:
    client = cluster.client.openai()
    given = client.images.generate(model="embedded", prompt=PROMPT, n=2, extra_body={"seed": 3})
    assert [image_of(one.b64_json).tobytes() for one in given.data] == [alone(um, 3), alone(um, 4)]
    for scene in scenes[:3]:
        answer = client.chat.completions.create(model="embedded", messages=[shows(scene, "what is this?")])
        assert answer.choices[0].message.content == um.ask(scene, "what is this?")


def test_rows_are_passed_on_as_they_come(cluster: Process, um: UniMM) -> None:
    events = drawn(cluster, 5)
    assert [event.type for event in events] == ["image_generation.partial_image"] * 3 + [
        "image_generation.completed"
    ]
    assert image_of(events[-1].b64_json).tobytes() == alone(um, 5)


def test_a_killed_replica_takes_only_its_own_requests(cluster: Process, um: UniMM) -> None:
    before = replicas()
    assert len(before) == 2
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: found.update({seed: drawn(cluster, seed)}))
        for seed in range(12)
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    os.kill(before[0], signal.SIGKILL)
    for thread in threads:
        thread.join(120)
    ends = {seed: events[-1] for seed, events in found.items()}
    whole = {
        seed: end for seed, end in ends.items() if getattr(end, "type", "") == "image_generation.completed"
    }
    assert len(ends) == 12 and whole
    assert all(isinstance(end, Exception) for seed, end in ends.items() if seed not in whole)
    for seed, end in whole.items():
        assert image_of(end.b64_json).tobytes() == alone(um, seed)
    deadline = time.monotonic() + 120
    while len(now := replicas()) < 2 or before[0] in now:
        assert time.monotonic() < deadline, "no replica took its place"
        time.sleep(0.2)
    assert drawn(cluster, 1)[-1].type == "image_generation.completed"


def test_sigterm_ends_it_and_leaves_nothing(cluster: Process) -> None:
    assert cluster.end() == 0, cluster.said()
    assert not replicas()
