"""Runs that are killed while they write, and what they leave."""

from __future__ import annotations

import csv
import json
import os
import signal
import traceback

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vae.files
from vae.engine.callbacks.records import CSVLogger
from vae.engine.run import evaluate, train

OFTEN = [
    "callbacks=default",
    "callbacks.pictures.points=16",
    "callbacks.interruptible.every_n_steps=3",
    "data.batch_size=20",  # of 64: the last batch has 4
    "trainer.log_every_n_steps=2",
]


def killed(config, folder, at=None):
    """Train in a process of its own, which kills itself at a moment of writing: (file, which of them, when).

    when: "before" it has its name, "after", or "within", a part of it being written.
    """
    pid = os.fork()
    if pid == 0:
        try:
            if at is not None:
                aim(*at)
            train(config, folder, [], resume=True, progress_bar=False)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def aim(file, number, when):
    count = iter(range(1, number))

    def is_the_moment(name):
        return name == file and next(count, None) is None

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    class System:
        """`os` as vae.files knows it."""

        def __getattr__(self, name):
            return getattr(os, name)

        def replace(self, temporary, path):
            moment = is_the_moment(path.name)
            if moment and when == "before":
                kill()
            os.replace(temporary, path)
            if moment:
                kill()

    vae.files.os = System()
    if file == "events":
        from tensorboard.summary.writer.record_writer import RecordWriter

        write = RecordWriter.write

        def torn(self, data):
            if is_the_moment("events"):
                self._writer.write(b"\x40\x00\x00")
                self._writer.flush()
                kill()
            write(self, data)

        RecordWriter.write = torn
    if file == "row":
        log = CSVLogger.log_metrics

        def torn_row(self, metrics, step=None):
            if is_the_moment("row"):
                with self.path.open("a") as rows:
                    rows.write("3,1")
                kill()
            log(self, metrics, step)

        CSVLogger.log_metrics = torn_row


def left_by(folder):
    """What a run left, without times: what it wrote, what it logged, and what later commands read of it."""
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics = {name: value for name, value in metrics.items() if "seconds" not in name}
    status = json.loads((folder / "status.json").read_text())
    left = {"metrics": metrics, "status": {key: status[key] for key in ("state", "reason", "epochs")}}
    assert evaluate(folder) == {name: value for name, value in metrics.items() if name.startswith("test/")}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".ckpt":
            content = torch.load(path, weights_only=True)
            content["callbacks"]["Interruptible"].pop("seconds")
            keys = ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step", "callbacks")
            left[name] = plain([content[key] for key in (*keys, "steps", "means", "open", "validation")])
        elif path.suffix == ".png":
            left[name] = path.read_bytes()
        elif path.suffix == ".csv":
            left[name] = list(csv.DictReader(path.open(newline="")))
        elif path.is_file():
            left["events" if "tfevents" in name else name] = None
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
    for tag in events.Tags()["scalars"]:
        left[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    for tag in events.Tags()["images"]:
        left[tag] = [(event.step, event.encoded_image_string) for event in events.Images(tag)]
    return left


def plain(value):
    """Tensors as the lists that compare."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def assert_the_same(cut, whole):
    assert cut.keys() == whole.keys()
    for name, value in whole.items():
        assert cut[name] == value, name
