"""Histories over REST: overviews of any range in two forms, and exports that the tools in question read back."""

import csv
import io
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet
import pytest
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from apt_jobs.client.client import Client
from apt_jobs.db.series.store import CURVES
from apt_jobs.errors import InvalidInput
from apt_jobs.events.kinds import Event, GradientsRecorded, LayersNamed, LineLogged, Validated
from apt_jobs.web.api.overviews import MEDIA_TYPE, points_that_fit
from tests.integration.db.steps import trained
from tests.integration.web.served import Served

pytestmark = pytest.mark.parametrize("served", ["direct"], indirect=True)
NUM_STEPS = 600
BAD_STEP = 137
NAMES = ("layers.0.weight", "layers.1.weight")


@pytest.fixture
def job_id(served: Served) -> str:
    job_id = served.new_job()
    events: list[Event] = [LayersNamed(NAMES)]
    for step in range(1, NUM_STEPS + 1):
        is_bad = step == BAD_STEP
        events.append(trained(step, loss=math.nan if is_bad else 600.0 / step))
        events.append(GradientsRecorded(step, (step / 8, math.inf if is_bad else 2.0), (1,) if is_bad else ()))
    events.append(Validated(NUM_STEPS, 0, 1.5, is_best=True))
    served.say(job_id, *events)
    return job_id


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    base = f"http://127.0.0.1:{served.settings.port}"
    with httpx.Client(base_url=base, headers=served.headers, trust_env=False, timeout=30) as client:
        yield client


def test_curves_of_a_range_have_extremes_and_hide_no_trouble(http: httpx.Client, job_id: str) -> None:
    answer = http.get(f"/api/jobs/{job_id}/metrics?points=10&from_step=101&to_step=500").raise_for_status()
    curves = answer.json()["training_history"]
    assert (len(curves["steps"]), curves["first_steps"][0], curves["steps"][-1]) == (10, 101, 500)
    assert curves["num_steps_recorded"] == 400
    loss = curves["extremes"]["train_loss"]
    (broken,) = [point for point, count in enumerate(loss["num_nonfinite"]) if count]
    assert curves["first_steps"][broken] <= BAD_STEP <= curves["steps"][broken]
    assert curves["train_loss"][broken] == "NaN"
    assert loss["max"][0] == pytest.approx(600.0 / 101)


def test_both_forms_of_an_overview_say_the_same(http: httpx.Client, job_id: str) -> None:
    path = f"/api/jobs/{job_id}/gradients/overview?points=20"
    as_json = http.get(path).raise_for_status().json()
    binary = http.get(path, headers={"accept": MEDIA_TYPE}).raise_for_status()
    assert binary.headers["content-type"] == MEDIA_TYPE
    read = decoded(binary.content)
    assert read["names"] == as_json["names"] == list(NAMES)
    assert read["first_steps"] == as_json["first_steps"]
    assert read["last_steps"] == as_json["last_steps"]
    assert read["num_steps"] == as_json["num_steps"]
    for name, below, above in (("min", 2**-7, 0), ("mean", 2**-8, 2**-8), ("max", 0, 2**-7)):
        exact = np.array(as_json[name], np.float64)
        assert (read[name] >= exact * (1 - below)).all()
        assert (read[name] <= exact * (1 + above)).all()
    (bad,) = [point for point, layers in enumerate(as_json["anomalous"]) if layers]
    assert as_json["anomalous"][bad] == as_json["nonfinite"][bad] == [1]
    assert np.argwhere(read["anomalous"]).tolist() == np.argwhere(read["nonfinite"]).tolist() == [[bad, 1]]
    assert as_json["layer_statistics"][NAMES[0]]["max"] == NUM_STEPS / 8
    assert read["total_steps"] == as_json["total_steps"] == NUM_STEPS


def test_zoomed_in_norms_are_whole(http: httpx.Client, job_id: str) -> None:
    path = f"/api/jobs/{job_id}/gradients/overview?from_step=130&to_step=140&format=binary"
    read = decoded(http.get(path).raise_for_status().content)
    assert read["first_steps"] == list(range(130, 141))
    assert read["mean"][:, 0].tolist() == [step / 8 for step in range(130, 141)]
    assert math.isinf(read["mean"][7, 1])


def decoded(body: bytes) -> dict[str, Any]:
    """As docs/explanation/histories.md says."""
    version, num_layers, num_points, size, rest, _ = struct.unpack_from("<6I", body)
    assert version == 1
    at = 24
    read: dict[str, Any] = {}
    for name, kind in (("first_steps", "<f8"), ("last_steps", "<f8"), ("num_steps", "<u4")):
        read[name] = np.frombuffer(body, kind, num_points, at).astype(int).tolist()
        at += num_points * np.dtype(kind).itemsize
    for name in ("mean",) if size == 4 else ("min", "max", "mean"):
        numbers = np.frombuffer(body, f"<u{size}", num_points * num_layers, at)
        whole = numbers if size == 4 else numbers.astype("<u4") << 16
        read[name] = whole.view("<f4").reshape(num_points, num_layers)
        at += numbers.nbytes
    for name in ("anomalous", "nonfinite"):
        count = -(-num_points * num_layers // 8)
        bits = np.unpackbits(np.frombuffer(body, "u1", count, at), bitorder="little")
        read[name] = bits[: num_points * num_layers].reshape(num_points, num_layers)
        at += count
    assert len(body) - at == rest
    return {**read, **json.loads(body[at:])}


def test_an_overview_of_150_layers_fits_into_200_kb(http: httpx.Client, served: Served) -> None:
    job_id = served.new_job()
    names = tuple(f"model.layers.{number}.mlp.gate_projection.weight" for number in range(150))
    served.say(job_id, LayersNamed(names), *[GradientsRecorded(step, (1.0,) * 150, ()) for step in range(1, 401)])
    body = http.get(f"/api/jobs/{job_id}/gradients/overview?format=binary").raise_for_status().content
    assert len(decoded(body)["first_steps"]) == points_that_fit(150) > 150
    assert len(body) <= 200_000


@pytest.mark.parametrize(
    "query",
    ["points=0", "points=1001", "points=x", "from_step=-1", "from_step=5&to_step=4", "format=xml", "unknown=1"],
)
def test_a_wrong_parameter_is_named(http: httpx.Client, job_id: str, query: str) -> None:
    answer = http.get(f"/api/jobs/{job_id}/gradients/overview?{query}")
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
    assert answer.json()["errors"]


def test_a_csv_export_has_a_row_for_each_step(http: httpx.Client, job_id: str) -> None:
    answer = http.get(f"/api/jobs/{job_id}/export?format=csv").raise_for_status()
    assert answer.headers["content-disposition"] == f'attachment; filename="{job_id}.csv"'
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert list(rows[0]) == ["step", "at", *CURVES, "val_loss", *(f"gradients/{name}" for name in NAMES)]
    assert [int(row["step"]) for row in rows] == list(range(1, NUM_STEPS + 1))
    assert rows[BAD_STEP - 1]["train_loss"] == "NaN"
    assert rows[BAD_STEP - 1][f"gradients/{NAMES[1]}"] == "Infinity"
    assert [row["val_loss"] for row in rows if row["val_loss"]] == ["1.5"]


def test_a_json_export_is_one_document(http: httpx.Client, job_id: str) -> None:
    document = http.get(f"/api/jobs/{job_id}/export?format=json").raise_for_status().json()
    assert (len(document["rows"]), len(document["columns"])) == (NUM_STEPS, len(document["rows"][0]))
    assert document["rows"][7][0] == 8
    assert document["rows"][7][-2:] == [1.0, 2.0]


def test_weights_and_biases_lines_have_its_names(http: httpx.Client, job_id: str) -> None:
    answer = http.get(f"/api/jobs/{job_id}/export?format=wandb").raise_for_status()
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert [line["_step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    assert lines[7][f"gradients/{NAMES[0]}"] == 1.0
    assert lines[0]["_timestamp"] > 1e9
    assert "val_loss" not in lines[0]
    assert lines[-1]["val_loss"] == 1.5


def test_a_parquet_export_is_read_by_arrow(http: httpx.Client, job_id: str) -> None:
    answer = http.get(f"/api/jobs/{job_id}/export?format=parquet").raise_for_status()
    table = pyarrow.parquet.read_table(io.BytesIO(answer.content))
    assert table.num_rows == NUM_STEPS
    assert table["step"].to_pylist() == list(range(1, NUM_STEPS + 1))
    assert math.isnan(table["train_loss"][BAD_STEP - 1].as_py())
    assert table["val_loss"].null_count == NUM_STEPS - 1
    assert table[f"gradients/{NAMES[0]}"][7].as_py() == 1.0


def test_a_tensorboard_export_is_read_by_tensorboard(served: Served, job_id: str, tmp_path: Path) -> None:
    file = tmp_path / "events.out.tfevents.1"
    with Client(f"http://127.0.0.1:{served.settings.port}", served.key) as client:
        client.export(job_id, "tensorboard", file)
        with pytest.raises(InvalidInput, match="format"):
            client.export(job_id, "excel", file)
    events = list(LegacyEventFileLoader(str(file)).Load())
    assert (events[0].file_version, len(events)) == ("brain.Event:2", NUM_STEPS + 1)
    assert [event.step for event in events[1:]] == list(range(1, NUM_STEPS + 1))
    values = {value.tag: value.simple_value for value in events[8].summary.value}
    assert values[f"gradients/{NAMES[0]}"] == 1.0
    assert values["train_loss"] == 75.0
    assert [path.name for path in tmp_path.iterdir() if "tfevents" in path.name] == [file.name]


@pytest.mark.parametrize("form", ["csv", "json", "wandb", "parquet", "tensorboard"])
def test_a_job_without_steps_exports_an_empty_file_of_its_form(http: httpx.Client, served: Served, form: str) -> None:
    answer = http.get(f"/api/jobs/{served.new_job()}/export?format={form}").raise_for_status()
    if form == "json":
        assert answer.json()["rows"] == []
    elif form == "parquet":
        assert pyarrow.parquet.read_table(io.BytesIO(answer.content)).num_rows == 0


def test_what_is_not_there_is_not_found(http: httpx.Client) -> None:
    for path in ("export?format=csv", "metrics", "gradients/overview"):
        assert http.get(f"/api/jobs/job_nothing/{path}").status_code == 404


def test_the_newest_lines_of_a_long_log_are_read_backwards(served: Served, http: httpx.Client) -> None:
    job_id = served.new_job()
    for first in range(0, 2_500, 250):
        served.say(job_id, *(LineLogged("info", "rank 0", f"line {index}") for index in range(first, first + 250)))
        served.say(job_id, trained(first + 1, loss=1.0))
    path = f"/api/jobs/{job_id}/events"
    seen: list[str] = []
    before, has_more = 2**53, True
    while has_more:
        page = http.get(path, params={"before": before, "limit": 1000, "kind": "log"}).raise_for_status().json()
        seqs = [event["seq"] for event in page["data"]]
        assert seqs == sorted(seqs)
        assert all(seq < before for seq in seqs)
        seen = [event["message"] for event in page["data"]] + seen
        before, has_more = seqs[0], page["has_more"]
    assert seen == [f"line {index}" for index in range(2_500)]
    assert http.get(path, params={"before": 1, "kind": "log"}).json()["data"] == []
    for kinds in ([], ["metric"], ["log", "gradient"]):
        refused = http.get(path, params={"before": 5, "kind": kinds})
        assert refused.status_code == 422, kinds
        assert "`before` needs `kind`s" in refused.text
