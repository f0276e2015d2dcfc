"""Event files read without running them, the red/blue picture, slices, and image preprocessing."""

from __future__ import annotations

import io
import os
import pickle

import numpy as np
import pytest
import torch

from xspec_runtime.data import pickled
from xspec_runtime.data.events import (
    Events,
    clip_preprocess,
    event_images,
    load_events,
    rasterize,
    split_by_count,
    window,
)
from xspec_runtime.data.images import CLIP_MEAN, CLIP_STD, resize


@pytest.fixture
def np_rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def fields(rng: np.random.Generator, count: int = 500) -> dict[str, np.ndarray]:
    return {
        "x": rng.integers(0, 640, count).astype(np.uint16),
        "y": rng.integers(0, 480, count).astype(np.uint16),
        "t": np.sort(rng.integers(0, 50_000, count)) + 51_834_000_000,
        "p": rng.integers(0, 2, count).astype(np.uint8),
    }


def dumped(content: object, protocol: int = 4) -> bytes:
    """A .npy file that holds `content` pickled in a 0-d object array."""
    stream = io.BytesIO()
    header = {"descr": "|O", "fortran_order": False, "shape": ()}
    np.lib.format.write_array_header_1_0(stream, header)
    stream.write(pickle.dumps(np.array(content, dtype=object), protocol=protocol))
    return stream.getvalue()


def assert_same(events: Events, expected: dict[str, np.ndarray]) -> None:
    dtypes = {"x": np.uint16, "y": np.uint16, "t": np.int64, "p": np.uint8}
    for name, dtype in dtypes.items():
        array = getattr(events, name)
        assert array.dtype == dtype
        assert np.array_equal(array, expected[name]), name


@pytest.mark.parametrize("form", ["numpy", "protocol3", "numpy1", "structured", "npz"])
def test_reads_every_form(form, tmp_path, np_rng):
    expected = fields(np_rng)
    path = tmp_path / ("events.npz" if form == "npz" else "events.npy")
    if form == "numpy":
        np.save(path, expected)
    elif form == "protocol3":
        path.write_bytes(dumped(expected, 3))
    elif form == "numpy1":
        module = b"cnumpy.core.multiarray\n"
        path.write_bytes(dumped(expected, 3).replace(b"cnumpy._core.multiarray\n", module))
        assert module in path.read_bytes()
    elif form == "npz":
        np.savez_compressed(path, **expected)
    else:
        record = np.zeros(500, [("t", "<i8"), ("x", ">u2"), ("y", "<u2"), ("p", "?")])
        for name, array in expected.items():
            record[name] = array
        np.save(path, record)
    assert_same(load_events(path), expected)


def test_converts_other_integer_types(tmp_path, np_rng):
    expected = fields(np_rng)
    expected["t"] -= 51_834_000_000
    types = {"x": ">i4", "y": "i8", "t": "u2", "p": "?"}
    np.save(tmp_path / "e.npy", {n: expected[n].astype(types[n]) for n in types})
    assert_same(load_events(tmp_path / "e.npy"), expected)


class Malicious:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def test_runs_nothing_a_file_names(tmp_path, np_rng):
    proof = tmp_path / "proof"
    command = f"touch {proof}"
    attacks = [
        Malicious(os.system, command),
        fields(np_rng) | {"note": Malicious(os.system, command)},
        Malicious(eval, f"open({str(proof)!r}, 'w')"),
        Malicious(getattr, "text", "upper"),
        Malicious(np.frombuffer, b"1234"),
        np.random.default_rng,
    ]
    for attack in attacks:
        path = tmp_path / "bad.npy"
        path.write_bytes(dumped(attack))
        with pytest.raises(ValueError, match="refused: names") as caught:
            load_events(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        assert not proof.exists()
    path.write_bytes(dumped(attacks[0]))
    np.load(path, allow_pickle=True)
    assert proof.exists(), "the attack does nothing where it is not stopped"


def test_refuses_opcodes_outside_the_list(tmp_path, np_rng):
    header, body = dumped(None)[:128], dumped(fields(np_rng))[128:]
    cases = {
        "NEWOBJ": b"\x80\x04cnumpy\ndtype\n)\x81.",
        "INST": b"(icollections\nOrderedDict\n.",
        "LONG_BINPUT": b"\x80\x04Nr\xff\xff\xff\x7f.",
        "EXT1": b"\x80\x04\x82\x01.",
        "BINPERSID": b"\x80\x04NQ.",
        "more than": b"\x80\x04" + b"(" * 5000 + b"t" * 5000 + b".",
    }
    for name, attack in cases.items():
        (tmp_path / "bad.npy").write_bytes(header + attack)
        with pytest.raises(ValueError, match=f"refused: .*{name}"):
            load_events(tmp_path / "bad.npy")
    (tmp_path / "good.npy").write_bytes(header + body)
    assert len(load_events(tmp_path / "good.npy")) == 500


def test_a_file_cannot_change_the_reader(tmp_path, np_rng):
    before = {name: dict(vars(record)) for name, record in pickled._STAND_INS.items()}
    header = dumped(None)[:128]
    for state in (b"}X\x07\x00\x00\x00resolveNs", b"N}X\x07\x00\x00\x00resolveNs\x86"):
        for name in (b"cnumpy\ndtype\n", b"cnumpy\nndarray\n"):
            (tmp_path / "bad.npy").write_bytes(header + b"\x80\x04" + name + state + b"b.")
            with pytest.raises(ValueError):
                load_events(tmp_path / "bad.npy")
    assert before == {name: dict(vars(record)) for name, record in pickled._STAND_INS.items()}


@pytest.mark.parametrize("form", ["dict", "npz", "structured"])
def test_every_truncation_is_one_clear_error(form, tmp_path, np_rng):
    whole, path = tmp_path / "whole", tmp_path / "cut.npy"
    events = fields(np_rng, 20)
    with whole.open("wb") as file:
        if form == "dict":
            np.save(file, events)
        elif form == "npz":
            np.savez(file, **events)
        else:
            np.save(file, np.rec.fromarrays(list(events.values()), names=list(events)))
    data = whole.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError) as caught:
            load_events(path)
        assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_flipped_bytes_give_events_or_a_value_error(tmp_path, np_rng):
    data = dumped(fields(np_rng, 20))
    path, outcomes = tmp_path / "flipped.npy", set()
    for _ in range(400):
        spoiled = bytearray(data)
        spoiled[np_rng.integers(len(data))] = np_rng.integers(256)
        path.write_bytes(spoiled)
        try:
            outcomes.add(type(load_events(path)))
        except ValueError:
            outcomes.add(ValueError)
    assert outcomes == {Events, ValueError}


WRONG = {
    "no polarity": (lambda f: f.pop("p"), "missing polarity"),
    "two missing": (lambda f: (f.pop("x"), f.pop("t")), "missing x, t: .* found p, y"),
    "lengths": (lambda f: f.update(x=f["x"][:-1]), "x, y, t, p differ in length: .*'x': 499"),
    "x outside": (
        lambda f: f["x"].__setitem__(3, 640),
        r"x on a 640x480 canvas.*0\.\.639, got 640",
    ),
    "y outside": (
        lambda f: f["y"].__setitem__(3, 480),
        r"y on a 640x480 canvas.*0\.\.479, got 480",
    ),
    "negative": (lambda f: f.update(x=f["x"].astype(int) - 999), r"x .* got -\d+"),
    "polarity": (lambda f: f.update(p=f["p"].astype(np.int8) * 2 - 1), "polarity p .* got -1"),
    "unsorted": (lambda f: f["t"].__setitem__(7, 0), r"not sorted by time: t\[7\]=0 < t\[6\]"),
    "empty": (lambda f: f.update({n: a[:0] for n, a in f.items()}), "no events"),
    "floats": (lambda f: f.update(t=f["t"] / 1e6), "t.*integer"),
    "matrix": (lambda f: f.update(x=f["x"].reshape(2, -1)), "x.*1-D"),
    "huge t": (lambda f: f.update(t=f["t"].astype(np.uint64) + 2**63), "t must fit int64"),
}


@pytest.mark.parametrize("form", ["dict", "npz"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_content_is_named(name, form, tmp_path, np_rng):
    spoil, message = WRONG[name]
    content = fields(np_rng)
    spoil(content)
    path = tmp_path / "wrong"
    with path.open("wb") as file:
        np.save(file, content) if form == "dict" else np.savez(file, **content)
    with pytest.raises(ValueError, match=message) as caught:
        load_events(path)
    assert "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"event file not found: .*none\.npy"):
        load_events(tmp_path / "none.npy")
    path = tmp_path / "file"
    for content, message in (
        (b"", "the file is empty"),
        (b"x,y,t,p\n", "neither a .npy nor a .npz"),
        (dumped([1, 2]), "expected one dict"),
        (dumped({"x": 1, "y": 1, "t": 1, "p": 1}), "x: 1-D integer array expected, got int"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_events(path)
    np.save(tmp_path / "frames.npy", np.zeros((8, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="expected a dict or a structured array"):
        load_events(tmp_path / "frames.npy")


def test_canvas_can_be_another(tmp_path, np_rng):
    content = fields(np_rng) | {"x": np.full(500, 1279), "y": np.full(500, 719)}
    np.save(tmp_path / "hd.npy", content)
    events = load_events(tmp_path / "hd.npy", height=720, width=1280)
    assert rasterize(events, 720, 1280).shape == (720, 1280, 3)
    with pytest.raises(ValueError, match="outside the 640x480 canvas"):
        rasterize(events)


def test_rasterize_equals_the_loop(np_rng):
    content = fields(np_rng, 3000)
    content["x"] //= 16
    content["y"] //= 16
    events = Events.from_arrays(content)
    expected = np.full((480, 640, 3), 255, np.uint8)
    for polarity, color in ((0, (0, 0, 255)), (1, (255, 0, 0))):
        for x, y, p in zip(content["x"], content["y"], content["p"], strict=True):
            if p == polarity:
                expected[y, x] = color
    picture = rasterize(events)
    assert picture.dtype == np.uint8 and np.array_equal(picture, expected)
    both = {(x, y) for x, y, p in zip(events.x, events.y, events.p, strict=True) if p == 0}
    assert both & {(x, y) for x, y, p in zip(events.x, events.y, events.p, strict=True) if p == 1}


def test_red_wins_whatever_the_order():
    for polarity in ([0, 1], [1, 0]):
        events = Events.from_arrays(
            {"x": np.array([5, 5]), "y": np.array([9, 9]), "t": np.arange(2), "p": polarity}
        )
        assert rasterize(events)[9, 5].tolist() == [255, 0, 0]


def test_slices_by_count(np_rng):
    events = Events.from_arrays(fields(np_rng, 503))
    parts = split_by_count(events, 5)
    assert [len(part) for part in parts] == [100, 100, 100, 100, 103]
    assert np.array_equal(np.concatenate([part.t for part in parts]), events.t)
    assert event_images(events, 5).shape == (5, 480, 640, 3)
    assert np.array_equal(event_images(events, 5)[4], rasterize(parts[4]))
    for bad in (0, 504):
        with pytest.raises(ValueError, match=f"cannot cut 503 events into {bad} slices"):
            split_by_count(events, bad)


def test_window_is_half_open():
    count = 6
    content = dict.fromkeys("xyp", np.zeros(count, int)) | {"t": np.array([0, 10, 10, 20, 30, 30])}
    events = Events.from_arrays(content)
    assert window(events, 10, 30).t.tolist() == [10, 10, 20]
    assert window(events, 0, 31).t.tolist() == events.t.tolist()
    empty = window(events, 100, 200)
    assert len(empty) == 0 and empty.duration_us == 0 and (rasterize(empty) == 255).all()
    assert events.duration_us == 30
    with pytest.raises(ValueError, match="start_us < end_us"):
        window(events, 5, 5)


@pytest.mark.parametrize("size", [64, 224, 336])
@pytest.mark.parametrize("shape", [(480, 640), (640, 480), (101, 77), (336, 336)])
def test_preprocess_equals_the_clip_processor(size, shape, np_rng):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    coarse = np_rng.integers(0, 256, (2, *shape, 3)).astype(np.uint8)
    crop = {"height": size, "width": size}
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=crop)
    expected = processor(list(coarse), return_tensors="pt")["pixel_values"]
    found = clip_preprocess(coarse, size)
    assert found.dtype == torch.float32 and found.shape == (2, 3, size, size)
    assert (found - expected).abs().max() < 1e-5
    assert torch.equal(found[:1], clip_preprocess(coarse[0], size))


def test_crop_drops_the_sides_and_squash_keeps_them():
    canvas = np.full((480, 640, 3), 255, np.uint8)
    canvas[:, :75] = canvas[:, 565:] = (0, 0, 255)
    white = (torch.ones(3) - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    cropped = clip_preprocess(canvas, 336)[0]
    assert torch.allclose(cropped, white.view(3, 1, 1).expand(3, 336, 336), atol=1e-6)
    squashed = resize(canvas[None], 336, "squash")[0]
    assert squashed.shape == (336, 336, 3)
    assert squashed[100, 5].tolist() == squashed[100, 330].tolist() == [0, 0, 255]


def test_preprocess_names_what_is_wrong():
    good = np.zeros((4, 4, 3), np.uint8)
    for image in (good.astype(np.float32), good[..., :2], good[0], good[:0]):
        with pytest.raises(ValueError, match=r"expected uint8 \[H, W, 3\]"):
            clip_preprocess(image)
    with pytest.raises(ValueError, match="size must be at least 1"):
        clip_preprocess(good, 0)
    with pytest.raises(ValueError, match="fit must be one of crop, squash, got 'pad'"):
        clip_preprocess(good, 4, fit="pad")
    with pytest.raises(ValueError, match="mean and std need 3 values"):
        clip_preprocess(good, 4, mean=(0.5,))
    with pytest.raises(ValueError, match="expected uint8"):
        resize(good, 4)


def test_recorded_events(shared_dir):
    files = sorted((shared_dir / "data" / "events").glob("*.npy"))
    if not files:
        pytest.skip(f"no recorded events below {shared_dir}")
    counts = {}
    for file in files:
        events = load_events(file)
        counts[file.stem] = len(events)
        assert_same(events, np.load(file, allow_pickle=True).item())
        assert 49_000 < events.duration_us <= 50_000
        ink = (rasterize(events) != 255).any(-1).mean()
        assert 0.05 < ink < 0.6
    assert counts["interlaken_00_d_000069"] == 293_355 and counts["sample1"] == 132_268
