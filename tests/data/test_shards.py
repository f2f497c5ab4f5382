"""Images streamed from tar shards: every one once, in an order that follows from seed and epoch, whoever reads them."""

from __future__ import annotations

import functools
import http.server
import io
import json
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vae import ranks
from vae.data import tars
from vae.data.loader import BatchLoader, EpochSampler
from vae.data.module import ImageDataModule
from vae.data.shards import order_of_reading, webdataset
from vae.engine.run import train
from vae.errors import VAEError
from vae.seeding import generator

pytest.importorskip("webdataset")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VAE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def png(value: int, size: int = 4) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((size, size), value, np.uint8)).save(file, "png")
    return file.getvalue()


def write_tar(path, files: dict[str, bytes], mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_shards(folder, counts=(7, 3, 5, 6, 4), first=0, labels=True):
    """Shards of so many images, the i-th of which is all i and has the label i; returns a pattern of them."""
    i = first
    for number, n in enumerate(counts):
        files = {}
        for _ in range(n):
            files[f"{i:04d}.png"] = png(i)
            if labels:
                files[f"{i:04d}.cls"] = b"%d" % i
            i += 1
        write_tar(folder / f"{number:02d}.tar", files)
    return f"{folder}/{{00..{len(counts) - 1:02d}}}.tar"


@pytest.fixture
def splits(tmp_path):
    val, test = write_shards(tmp_path / "val", (3,), 100), write_shards(tmp_path / "test", (2, 1), 200)
    path = write_shards(tmp_path / "train")
    return functools.partial(webdataset, path, val, test, shuffle_buffer=6, open_shards=2)


def epoch(split, number=0, batch_size=4, workers=0, seed=0, shuffle=True, skip=0):
    loader = BatchLoader(split, EpochSampler(len(split), batch_size, seed, shuffle, images=split), "train", workers)
    loader.sampler.set_epoch(number)
    loader.load_state_dict({"batches_done": skip})
    batches = list(loader)
    for batch in batches:  # the label names the image, so that neither can be another's
        assert torch.equal(batch.x, batch.y.view(-1, 1, 1, 1).expand(-1, 1, 4, 4).to(torch.uint8))
    return batches


def rows(batches) -> list[int]:
    return torch.cat([batch.y for batch in batches]).tolist()


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_an_epoch_has_every_image_once_in_one_order_for_any_number_of_workers(splits, workers):
    train = splits().train
    found = rows(epoch(train, 1, workers=workers))
    assert sorted(found) == list(range(25))
    assert found == rows(epoch(train, 1))
    assert found != sorted(found)


def test_the_order_follows_from_seed_and_epoch(splits):
    train = splits().train
    orders = [rows(epoch(train, number, seed=seed)) for seed, number in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] == rows(epoch(splits().train, 0))
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("world", [2, 3])
def test_of_each_batch_the_processes_read_and_decode_every_row_once(splits, monkeypatch, world):
    train = splits().train
    whole = rows(epoch(train, 2))

    def share(rank, **options):
        """The rows that this rank reads, batch by batch, in place of what all of them together have."""
        monkeypatch.setattr(ranks, "rank", lambda: rank)
        monkeypatch.setattr(ranks, "joined", lambda x, n: x[: ranks.sizes(n, world)[rank]])
        return [batch.y.tolist() for batch in epoch(train, workers=rank, **options)]

    monkeypatch.setattr(ranks, "world_size", lambda: world)
    parts = [share(rank, number=2) for rank in range(world)]
    assert [row for batch in zip(*parts, strict=True) for own in batch for row in own] == whole
    measured = [share(rank, shuffle=False) for rank in range(world)]
    assert [row for batch in zip(*measured, strict=True) for own in batch for row in own] == list(range(25))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_remains_after_any_batch_is_what_an_epoch_that_was_never_stopped_would_give(splits, workers):
    train = splits().train
    whole = epoch(train, 3)
    for k in range(1, len(whole)):
        rest = epoch(train, 3, workers=workers, skip=k)
        assert [batch.seed for batch in rest] == [batch.seed for batch in whole[k:]]
        assert [batch.y.tolist() for batch in rest] == [batch.y.tolist() for batch in whole[k:]]


def test_no_image_is_moved_by_more_than_the_buffer_nor_are_more_held(splits):
    """Reading in the old order and giving out in the new one, as the images are due."""
    train = splits().train
    order = train.shuffled(generator(0)).numpy()
    shard_of = np.searchsorted(train.ends, order, side="right")
    read = order[order_of_reading(order, shard_of)]
    for shard in range(5):
        assert (np.diff(read[np.searchsorted(train.ends, read, side="right") == shard]) > 0).all()
    held, most, coming = set(), 0, iter(read.tolist())
    for row in order.tolist():
        while row not in held:
            held.add(next(coming))
        most = max(most, len(held))
        held.remove(row)
    assert 1 < most <= 6
    train.shuffle_buffer = 1  # moves none: only the shards' order and their turns remain
    plain = train.shuffled(generator(0)).tolist()
    first, second = np.searchsorted(train.ends, plain[:2], side="right")
    assert first != second  # two are open
    train.open_shards = 1
    assert np.array_equal(np.sort(np.flatnonzero(np.diff(train.shuffled(generator(0)).numpy()) != 1)), edges(train))


def edges(train) -> np.ndarray:
    """Where an epoch that has one shard after the other leaves one for the next, which is not the one that follows it."""
    order = torch.randperm(5, generator=generator(0)).numpy()
    last = np.cumsum([train.shards[i].images for i in order])[:-1] - 1
    return last[np.diff(order) != 1]


def test_a_pass_opens_each_shard_once_and_decodes_nothing_that_is_left_out(splits, monkeypatch):
    from vae.data import shards

    train, opened, decoded = splits().train, [], []
    walk, decode = tars._walk, shards.decode
    monkeypatch.setattr(tars, "_walk", lambda name, select: opened.append(name) or walk(name, select))
    monkeypatch.setattr(shards, "decode", lambda *given: decoded.append(1) or decode(*given))
    epoch(train, workers=2)
    assert (len(opened), len(set(opened)), len(decoded)) == (5, 5, 25)
    opened.clear(), decoded.clear()
    epoch(train, skip=5)
    assert len(opened) <= 5 and len(decoded) == 5


def test_rows_are_gathered_in_any_order_and_more_than_once(splits):
    x, y = splits().train.gather(torch.tensor([24, 0, 13, 0]))
    assert x[:, 0, 0, 0].tolist() == y.tolist() == [24, 0, 13, 0]
    assert splits().val.gather(torch.tensor([2]))[1].tolist() == [102]


def test_shards_that_name_no_splits_are_held_out_by_seed(tmp_path):
    path = write_shards(tmp_path, (2,) * 20)
    parts = [{shard.name for shard in split.shards} for split in webdataset(path, seed=3)]
    assert [len(part) for part in parts] == [16, 2, 2] and len(set.union(*parts)) == 20
    assert parts == [{shard.name for shard in split.shards} for split in webdataset(tmp_path, seed=3)]
    assert parts != [{shard.name for shard in split.shards} for split in webdataset(path, seed=4)]
    assert [len(split.shards) for split in webdataset(f"{tmp_path}/*.tar", val_shards=5, test_shards=1)] == [14, 5, 1]


def test_shards_are_counted_once_and_again_when_they_change(splits, tmp_path, monkeypatch):
    splits()
    counted = []
    count = tars._count
    monkeypatch.setattr(tars, "_count", lambda name, labels: counted.append(name) or count(name, labels))
    assert splits().train.y.tolist() == list(range(25)) and not counted
    write_tar(tmp_path / "train" / "00.tar", {"a.png": png(9), "a.cls": b"9"})
    assert len(splits().train) == 19 and counted == [str(tmp_path / "train" / "00.tar")]


def test_images_are_fitted_as_those_of_a_folder_are(tmp_path):
    from vae.data.decoding import Options, decode

    image = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    for i in range(3):
        write_tar(
            tmp_path / f"{i}.tar.gz",
            {"sub/b.seg.png": png(1), "sub/b.json": b"{}", "sub/b.PNG": file.getvalue(), "sub/b.jpg": png(1)},
            "w:gz",
        )
    for fit in ("crop", "pad", "stretch"):
        train = webdataset(tmp_path, size=[8, 10], fit=fit).train
        assert (train.shape, train.y, len(train)) == ((3, 8, 10), None, 1)
        (tmp_path / "one.png").write_bytes(file.getvalue())
        expected = decode(tmp_path / "one.png", Options((8, 10), fit, 3))
        assert np.array_equal(train.gather(torch.tensor([0]))[0][0], expected)
    assert webdataset(tmp_path).train.shape == (3, 40, 30) and webdataset(tmp_path, channels=1).train.shape[0] == 1


class Server(http.server.SimpleHTTPRequestHandler):
    breaks = 0
    asked: list[str] = []

    def log_message(self, *_):
        pass

    def do_GET(self):
        type(self).asked.append(self.path)
        if self.path.endswith(".tar") and type(self).breaks:
            type(self).breaks -= 1
            data = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            return
        super().do_GET()


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(tars.time, "sleep", lambda _: None)
    monkeypatch.setattr(Server, "breaks", 0)
    monkeypatch.setattr(Server, "asked", [])
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Server, directory=str(tmp_path))
    ) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http_server.server_port}"
        http_server.shutdown()


def test_shards_on_the_web_are_read_as_those_on_a_disk_and_go_on_where_they_broke_off(tmp_path, server):
    write_shards(tmp_path / "s", (7, 6, 5))
    found = webdataset(f"{server}/s/{{00..02}}.tar")
    local = webdataset(tmp_path / "s")
    assert len(Server.asked) == 4  # each is counted once, and one is looked at
    expected = [batch.y.tolist() for batch in epoch(local.train)]
    Server.asked.clear()
    Server.breaks = 2
    assert [batch.y.tolist() for batch in epoch(found.train, workers=1)] == expected
    assert len(Server.asked) == 3  # one shard, three times
    webdataset(f"{server}/s/{{00..02}}.tar")
    assert len(Server.asked) == 4  # no shard was counted again
    Server.breaks = 9
    with pytest.raises(
        VAEError, match=rf"The shard {server}/s/0\d.tar is damaged or cut short \(.*\): copy or write it"
    ):
        epoch(found.train)
    with pytest.raises(VAEError, match=f"The shard {server}/none.tar cannot be read .*404"):
        webdataset(f"{server}/none.tar", val_shards=None, test=f"{server}/a.tar", val=f"{server}/b.tar")


def test_a_shard_that_was_cut_anywhere_is_told_with_its_name(tmp_path):
    write_shards(tmp_path, (2, 2, 2))
    path = tmp_path / "01.tar"
    data = path.read_bytes()
    for length in (0, 100, 512, 600, 1024, 1500, 2048, 2560):
        path.write_bytes(data[:length])
        with pytest.raises(VAEError, match=f"The shard {path} is damaged or cut short"):
            webdataset(tmp_path)
    path.write_bytes(data + data)  # the second would be left out
    with pytest.raises(VAEError, match=f"The shard {path} is damaged or cut short"):
        webdataset(tmp_path)
    write_tar(path, {f"{i}.png": bytes([i + 1]) * 40960 for i in range(3)})
    damaged = bytearray(path.read_bytes())
    damaged[512 + 40960 : 1024 + 40960] = b"\xff" * 512  # a header, which Python takes for the end
    path.write_bytes(bytes(damaged))
    with pytest.raises(VAEError, match=rf"The shard {path} is damaged or cut short \(it does not end as a tar does\)"):
        webdataset(tmp_path)


def test_a_shard_that_changes_while_it_is_read_is_told(splits, tmp_path):
    train = splits().train
    path = tmp_path / "train" / "02.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:1024])
    with pytest.raises(VAEError, match=f"The shard {path} is damaged or cut short"):
        epoch(train, workers=2)
    write_tar(path, {"a.png": png(9), "a.cls": b"9"})
    with pytest.raises(VAEError, match=f"{path} has 1 images, and should have 5"):
        epoch(train)


def test_nothing_is_counted_where_all_shards_have_as_many(tmp_path, monkeypatch):
    path = write_shards(tmp_path, (4,) * 5)
    monkeypatch.setattr(tars, "_count", None)
    train = webdataset(path, images_per_shard=4).train
    assert (len(train), train.y) == (12, None)
    with pytest.raises(VAEError, match=r"\d.tar has 4 images, and should have 3: .*data.source.images_per_shard"):
        webdataset(path, images_per_shard=3)  # which looks at the first images of one
    train = webdataset(path, images_per_shard=3, size=4, channels=1).train
    assert train.gather(torch.arange(2))[0].shape == (2, 1, 4, 4)
    with pytest.raises(VAEError, match=r"\d.tar has 4 images, and should have 3"):
        train.gather(torch.arange(9))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"path": "pipe:touch ran"},
            "data.source.path=pipe:touch ran is read neither .*: pipe: is refused, and no command",
        ),
        ({"path": "s3://bucket/{0..9}.tar"}, "s3: is refused"),
        ({"path": "none/*.tar"}, r"data.source.path=none/\*.tar has no shards"),
        ({"path": []}, r"data.source.path=\[\] names no shard"),
        ({"path": "{0..2}.tar"}, r"The shard \d.tar cannot be read \(No such file"),
        ({"path": "one.tar"}, "no way to hold out 1 for val and 1 for test of 1 shards"),
        ({"path": "{0..2}.tar", "val": "2.tar"}, "2.tar is a shard of both train and val"),
        ({"path": "{0..2}.tar", "val": "3.tar", "val_shards": 1}, "data.source.val_shards=1 has no effect"),
        ({"path": "{0..2}.tar", "shuffle_buffer": 0}, "data.source.shuffle_buffer=0 must be a whole number"),
        ({"path": "{0..2}.tar", "fit": "maybe"}, "choose one of crop, pad, stretch"),
        ({"path": "{0..2}.tar", "size": 0}, "data.source.size=0 must be a number of pixels"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(options, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VAEError, match=sentence):
        webdataset(**options)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"a.txt": b""}, "bad/0.tar has no images, whose names end in .png"),
        ({"a.png": png(1), "a.cls": b"cat"}, "a.cls of .*bad/0.tar must hold a label, a whole number, and holds 'cat'"),
        ({"a.png": png(1), "b.png": png(1), "b.cls": b"1"}, "^a of .*0.tar has no label in a .cls file"),
        ({"a.png": png(1)}, "0.tar has images without a label in a .cls file, and other shards"),
        ({"a.png": b"none", "a.cls": b"1"}, "a.png of .*0.tar cannot be decoded as an image"),
    ],
)
def test_what_a_shard_lacks_is_told_with_its_name(files, sentence, tmp_path):
    path = write_tar(tmp_path / "bad" / "0.tar", files)
    val, test = write_shards(tmp_path / "val", (1,)), write_shards(tmp_path / "test", (1,))
    with pytest.raises(VAEError, match=sentence):
        webdataset(str(path), val, test)
    if "cls" in sentence:
        assert webdataset(str(path), val, test, labels=False).train.y is None


def test_a_run_on_shards_that_was_stopped_within_an_epoch_ends_as_if_it_had_not_been(tiny, tmp_path):
    write_shards(tmp_path / "s", (20, 20, 20, 10), labels=False)

    def trained(name, steps, **resume):
        data = [f"data.source.path={tmp_path / 's'}", "data.limit=null", "data.batch_size=8", "data.num_workers=1"]
        config = tiny("data=webdataset", *data, "trainer.max_epochs=-1", f"trainer.max_steps={steps}")
        train(config, tmp_path / name, [], progress_bar=False, **resume)
        last = torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
        return last["state_dict"], json.loads((tmp_path / name / "metrics.json").read_text())

    trained("two", 2)  # of five or four batches
    (there, metrics), (expected, at_once) = trained("two", 7, resume=True), trained("one", 7)
    assert metrics["test/elbo"] == at_once["test/elbo"] < 0
    assert all(torch.equal(there[name], expected[name]) for name in expected)


def test_what_needs_all_images_at_hand_is_refused_in_a_sentence(splits):
    with pytest.raises(VAEError, match="held in memory: use none or threshold here"):
        ImageDataModule(splits, batch_size=4, binarize="dynamic").setup()
    with pytest.raises(VAEError, match="no labelled images of theirs can join every batch"):
        ImageDataModule(splits, batch_size=4).add_labelled(2)
    data = ImageDataModule(splits, batch_size=4)
    assert data.train_mean().shape == (1, 4, 4)
    assert data.examples("test", 2).y.tolist() == [200, 201]
    assert set(splits().train.glance(4).tolist()) == {0, 7, 10, 15} and len(splits().train.glance(99)) == 25
