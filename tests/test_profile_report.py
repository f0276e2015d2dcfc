"""`xspec report`: one run seen by three recorders, and files that are something else."""

from __future__ import annotations

import json
import random
import sqlite3
from pathlib import Path

import pytest
import torch

from running import invoke
from xspec_kernels import ranges
from xspec_runtime.commands import app
from xspec_runtime.drafters.base import Request
from xspec_runtime.profiling.events import write_events
from xspec_runtime.profiling.figures import figures, read_timeline
from xspec_runtime.profiling.timeline import common, length, union
from xspec_runtime.workloads import PLAIN, MiniPair, Settings

# (name, start, end, payload, within a verify: GPU work), microseconds; one request, a step of 100.
REQUEST = [
    ("target.prefill", 0, 1000, 64),
    ("draft.propose", 1000, 1020, 16),
    ("target.decode", 1020, 1120, 1),
    ("verify.commit", 1100, 1110, 0),
    ("draft.propose", 1130, 1170, 16),
    ("verify", 1170, 1290, 16),
    ("verify.forward", 1170, 1200, 16),
    ("readback", 1210, 1260, 3),
    ("verify.commit", 1270, 1280, 3),
    ("draft.propose", 1300, 1340, 16),
    ("verify", 1340, 1480, 12),
    ("readback", 1400, 1450, 3),
    ("verify.commit", 1460, 1470, 2),
]
# Of each round: launch call, start and end on the GPU, a call that waits.
GPU = [(1030, 1040, 1090, 1095), (1180, 1190, 1250, 1255), (1350, 1360, 1440, 1445)]


def nsys(path: Path, spans: list, drop: tuple[str, ...] = (), graphs: bool = True) -> Path:
    """A file in the form that `nsys export --type sqlite` writes."""
    kind, base = "CUPTI_ACTIVITY_KIND_", sqlite3.connect(path)
    base.executescript(
        f"""
        CREATE TABLE StringIds (id INTEGER PRIMARY KEY, value TEXT NOT NULL);
        CREATE TABLE NVTX_EVENTS (start INT, end INT, eventType INT, rangeId INT, category INT,
            color INT, text TEXT, globalTid INT, endGlobalTid INT, textId INT, domainId INT,
            uint64Value INT, int64Value INT);
        CREATE TABLE {kind}RUNTIME (start INT, end INT, eventClass INT, globalTid INT,
            correlationId INT, nameId INT, returnValue INT);
        CREATE TABLE {kind}KERNEL (start INT, end INT, deviceId INT, correlationId INT);
        CREATE TABLE {kind}GRAPH_TRACE (start INT, end INT, deviceId INT, correlationId INT);
        """
    )
    names = [*ranges.NAMES, "cudaGraphLaunch_v10000", "cudaStreamSynchronize_v3020", "cudaFree"]
    base.executemany("INSERT INTO StringIds VALUES (?, ?)", enumerate(names))
    row = "INSERT INTO NVTX_EVENTS VALUES (?,?,?,NULL,NULL,NULL,?,1,NULL,?,?,NULL,?)"
    base.execute(row, (0, None, 75, "xspec", None, 7, None))
    base.execute(row, (0, None, 75, "other", None, 8, None))
    base.execute(row, (0, 999_000_000, 59, "verify", None, 8, 5))
    base.execute(row, (5000, None, 59, "verify", None, 7, 5))
    for i, (name, start, end, payload) in enumerate(spans):
        # Both ways in which a name is kept.
        text, known = (name, None) if i % 2 else (None, names.index(name))
        base.execute(row, (1000 * start, 1000 * end, 59, text, known, 7, payload))
    call = f"INSERT INTO {kind}RUNTIME VALUES (?, ?, 0, 1, ?, ?, 0)"
    for link, (asked, start, end, waited) in enumerate(GPU, 100):
        base.execute(call, (1000 * asked, 1000 * asked + 500, link, len(names) - 3))
        base.execute(call, (1000 * waited, 1000 * waited + 900, link + 100, len(names) - 2))
        base.execute(call, (1000 * waited, 1000 * waited + 900, link + 200, len(names) - 1))
        table = f"{kind}GRAPH_TRACE" if graphs else f"{kind}KERNEL"
        base.execute(f"INSERT INTO {table} VALUES (?, ?, 0, ?)", (1000 * start, 1000 * end, link))
    for table in drop:
        base.execute(f"DROP TABLE {table}")
    base.commit()
    base.close()
    return path


def chrome(path: Path, spans: list) -> Path:
    """A trace as torch.profiler writes it on a GPU."""
    events = [{"ph": "M", "name": "process_name"}, {"ph": "X", "cat": "cpu_op", "name": "aten::mm",
               "ts": 3, "dur": 1, "tid": 1}]  # fmt: skip

    def add(cat: str, name: str, start: float, end: float, **args) -> None:
        events.append({"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start,
                       "tid": 1, "args": args})  # fmt: skip

    for name, start, end, payload in spans:
        add("user_annotation", f"xspec:{name}#{payload}", start, end)
    for link, (asked, start, end, waited) in enumerate(GPU):
        add("cuda_runtime", "cudaGraphLaunch", asked, asked + 1, correlation=link)
        add("cuda_runtime", "cudaStreamSynchronize", waited, waited + 1, correlation=link + 100)
        add("kernel", "verify_kernel", start, end, correlation=link)
    path.write_text(json.dumps({"traceEvents": events}))
    return path


def own(path: Path, spans: list) -> Path:
    write_events(path, [ranges.Event(n, 1000 * a, 1000 * b, p, 1) for n, a, b, p in spans])
    return path


MAKERS = {"nsys": nsys, "chrome": chrome, "own": own}


@pytest.mark.parametrize("maker", MAKERS)
def test_figures_of_a_known_request(maker: str, tmp_path: Path) -> None:
    found = figures(read_timeline(MAKERS[maker](tmp_path / "recording", REQUEST)))
    assert found["requests"] == 1 and found["request_ms"] == pytest.approx(1.48)
    assert found["verify"] == pytest.approx({"count": 2, "median_ms": 0.13, "p95_ms": 0.139})
    assert found["plain"]["count"] == 1 and found["readbacks_per_round"] == pytest.approx(2 / 3)
    assert found["gap"]["median_ms"] == pytest.approx(0.05)
    assert found["ranges"]["target.prefill"]["share"] == pytest.approx(1000 / 1480)
    assert found["ledger"] == {
        "tokens_saved": 5,
        "rows_per_verify": 14,
        "drafting_ms": pytest.approx(0.1),
        "step_ms": pytest.approx(0.1),
        "step_from": "median of 1 plain rounds",
        "saved_ms": pytest.approx(0.5),
        "overhead_ms": pytest.approx(0.06),
        "net_ms": pytest.approx(0.34),
    }
    if maker == "own":
        assert found["gpu_busy"] is None and found["launches_per_round"] is None
        return
    assert found["gpu_busy"] == pytest.approx(190 / 1480)
    assert found["gpu_busy_per_round_ms"] == pytest.approx(0.06)
    assert found["gpu_rest"]["median_ms"] == pytest.approx((0.1 + 0.11) / 2)
    assert found["launches_per_round"] == 1 and found["cuda_waits_per_round"] == 1


def test_kernels_and_graphs_are_one_to_the_table(tmp_path: Path) -> None:
    nodes = figures(read_timeline(nsys(tmp_path / "node", REQUEST, graphs=False)))
    assert nodes == figures(read_timeline(nsys(tmp_path / "graph", REQUEST)))


def test_step(tmp_path: Path) -> None:
    """Given, or as the payloads have it, or unknown."""
    drafted = [s for s in REQUEST if s[0] != "target.decode" and s[1] != 1100]
    found = figures(read_timeline(own(tmp_path / "a", drafted)), step_ms=0.2)["ledger"]
    assert found["saved_ms"] == pytest.approx(1.0) and found["step_from"] == "given"
    found = figures(read_timeline(own(tmp_path / "b", drafted)))["ledger"]
    assert found["step_ms"] is None and found["net_ms"] is None and found["tokens_saved"] == 5
    shown = [*drafted, ("verify.saved", 1285, 1286, 240), ("verify.saved", 1472, 1473, 160)]
    found = figures(read_timeline(own(tmp_path / "c", shown)))["ledger"]
    assert found["step_ms"] == pytest.approx(0.08)
    with pytest.raises(ValueError, match="expected more than 0"):
        figures(read_timeline(own(tmp_path / "d", drafted)), step_ms=0.0)


def test_requests_are_told_apart(tmp_path: Path) -> None:
    later = [(name, a + 10_000, b + 10_000, p) for name, a, b, p in REQUEST]
    early = [("draft.prefill", 9_500, 9_600, 8)]
    found = figures(read_timeline(own(tmp_path / "two", [*REQUEST, *early, *later])))
    assert found["requests"] == 2 and found["request_ms"] == pytest.approx(1.48 + 1.98)
    # The pause between them is no gap between rounds.
    assert found["gap"]["count"] == 4 and found["gap"]["p95_ms"] < 0.06


def test_unions() -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    left, right = ([(a, a + rng.randrange(9)) for a in rng.choices(range(60), k=8)] for _ in "ab")
    cells = [{x for a, b in side for x in range(a, b)} for side in (left, right)]
    assert length(union(left)) == len(cells[0]), seed
    assert common(union(left), union(right)) == len(cells[0] & cells[1]), seed


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """One run of the embedded pair as torch.profiler and our own events saw it."""
    folder = tmp_path_factory.mktemp("recorded")
    pair = MiniPair(Settings(max_new_tokens=24))
    decoders = [pair.decoder("tree"), pair.decoder(PLAIN)]
    tasks = pair.scene_tasks(2)
    for decoder in decoders:
        decoder.generate(tasks[0].inputs, tasks[0].request)
    events = ranges.Events()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        torch.profiler.profile(activities=activities) as profiler,
        ranges.listening(ranges.TorchProfiler(), events),
    ):
        answers = [d.generate(t.inputs, t.request) for d in decoders for t in tasks]
    assert not ranges.attached()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    write_events(folder / "events.jsonl", events.found)
    files = {"trace": folder / "trace.json", "events": folder / "events.jsonl"}
    return {"files": files, "answers": answers} | {
        kind: figures(read_timeline(path)) for kind, path in files.items()
    }


def test_two_sources_of_one_run_agree(recorded: dict) -> None:
    trace, events = recorded["trace"], recorded["events"]
    rounds = [r for answer in recorded["answers"] for r in answer.rounds]
    for found in (trace, events):
        assert found["requests"] == 4
        assert found["verify"]["count"] == sum(r.rows > 1 for r in rounds) > 3
        assert found["ledger"]["tokens_saved"] == sum(r.accepted for r in rounds) > 3
        assert found["readbacks_per_round"] == 1
    assert trace["request_ms"] == pytest.approx(events["request_ms"], rel=0.05)
    for key in ("verify", "plain"):
        # Of few rounds the 95th percentile is the one that something interrupted.
        medians = [found[key]["median_ms"] for found in (trace, events)]
        assert medians[0] == pytest.approx(medians[1], rel=0.05)
    for key in ("target.prefill", "target.decode", "verify", "verify.forward"):
        assert trace["ranges"][key]["share"] == pytest.approx(
            events["ranges"][key]["share"], rel=0.05
        )
    for key in ("step_ms", "saved_ms"):
        assert trace["ledger"][key] == pytest.approx(events["ledger"][key], rel=0.05)
    # Proposals are so short that a recorder's own cost shows, and net is a difference.
    room = 0.05 * events["request_ms"]
    for key in ("drafting_ms", "net_ms"):
        assert trace["ledger"][key] == pytest.approx(events["ledger"][key], abs=room)


def test_command(recorded: dict, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    files = [str(path) for path in recorded["files"].values()]
    shown = invoke(app, "report", *files, "--json", out)
    assert shown.exit_code == 0, shown.output
    for word in ("verify ms", "GPU busy", "launches a round", "= net", "target.prefill"):
        assert word in shown.output
    assert json.loads(out.read_text()) == json.loads(
        json.dumps({f: recorded[k] for k, f in zip(recorded["files"], files, strict=True)})
    )


def test_what_a_verify_cost_and_saved_is_shown() -> None:
    """Once the decoder has seen a plain round."""
    from tiny import OracleDrafter, prompt, tiny_llama
    from xspec_runtime.config import SpecConfig
    from xspec_runtime.engine import SpeculativeDecoder
    from xspec_runtime.targets.transformers import TransformersTarget

    target, ids = TransformersTarget(tiny_llama(3), 128), prompt(3)
    decoder = SpeculativeDecoder(target, None, SpecConfig(6, max_new_tokens=16))
    answer = decoder.generate({"input_ids": ids}).tokens
    decoder.drafter, events = OracleDrafter(answer, 3), ranges.Events()
    with ranges.listening(events):
        out = decoder.generate({"input_ids": ids}, Request(ids[0].tolist()))
    assert out.tokens == answer
    drafted = [r for r in out.rounds if r.rows > 1]
    step = 1e3 * 1e3 * decoder._step
    for name, want in {
        "verify": [r.rows for r in drafted],
        "verify.overhead": [round(1e3 * r.verify_ms - step) for r in drafted],
        "verify.saved": [round(r.accepted * step) for r in drafted],
    }.items():
        got = [e.payload for e in events.found if e.name == name]
        assert got == pytest.approx(want, abs=1), name


BAD = {
    "no NVTX": (lambda p: nsys(p, REQUEST, ("NVTX_EVENTS",)), "no table NVTX_EVENTS"),
    "no strings": (lambda p: nsys(p, REQUEST, ("StringIds",)), "no table StringIds"),
    "no range": (lambda p: nsys(p, []), "no ranges in the NVTX domain 'xspec'"),
    "no round": (lambda p: own(p, REQUEST[:1]), "nothing was decoded"),
    "cut": (lambda p: p.write_bytes(b"SQLite format 3\0" + bytes(90)), "no Nsight Systems export"),
    "empty": (lambda p: p.write_text(""), "is not JSON"),
    "text": (lambda p: p.write_text("verify 3"), "is not JSON"),
    "other JSON": (lambda p: p.write_text('{"a": 1}'), "no chrome trace"),
    "no annotation": (lambda p: p.write_text('{"traceEvents": []}'), "TorchProfiler"),
    "no time": (lambda p: p.write_text('[{"ph": "X", "ts": "1"}]'), "event 0 has no time"),
    "NaN": (lambda p: p.write_text('[{"ph": "X", "ts": NaN}]'), "event 0 has no time"),
    "header": (lambda p: p.write_text('{"format": "xspec events 9"}\n'), "line 1"),
    "event": (
        lambda p: p.write_text('{"format": "xspec events 1"}\n["verify", 5, 4, 1, 1]'),
        "line 2",
    ),
    "name": (
        lambda p: p.write_text('[{"ph":"X","ts":1,"cat":"user_annotation","name":"xspec:x"}]'),
        "'xspec:x' is no range of ours",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_other_files_are_one_line(kind: str, tmp_path: Path) -> None:
    make, message = BAD[kind]
    make(tmp_path / "file")
    shown = invoke(app, "report", tmp_path / "file")
    assert shown.exit_code == 2 and message in shown.output.replace("\n", " "), shown.output
    assert len(shown.output.strip().splitlines()) == 1


def test_missing_tables_of_cuda_are_named(tmp_path: Path) -> None:
    path = nsys(tmp_path / "a.sqlite", REQUEST, ("CUPTI_ACTIVITY_KIND_RUNTIME",))
    found = figures(read_timeline(path))
    assert found["gpu_busy"] is None and "CUPTI_ACTIVITY_KIND_RUNTIME" in found["notes"][0]
    gone = ("CUPTI_ACTIVITY_KIND_KERNEL", "CUPTI_ACTIVITY_KIND_GRAPH_TRACE")
    found = figures(read_timeline(nsys(tmp_path / "b.sqlite", REQUEST, gone)))
    assert found["gpu_busy"] is None and gone[0] in found["notes"][0]
    assert found["launches_per_round"] == 1


def test_the_file_stays_as_it_is(tmp_path: Path) -> None:
    """Views of an unknown file are not run, and nothing is written beside it."""
    path = nsys(tmp_path / "a #1?.sqlite", REQUEST, ("StringIds",))
    with sqlite3.connect(path) as base:
        base.execute("CREATE VIEW StringIds AS SELECT 1 AS id, 'verify' AS value")
    base.close()
    before = path.read_bytes()
    with pytest.raises(ValueError, match="no table StringIds"):
        read_timeline(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
