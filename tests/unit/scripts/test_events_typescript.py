"""The generated TypeScript says what the Python types say."""

import pytest

from apt_jobs.events.kinds import EVENT_TYPES
from scripts.events_typescript import _type, typescript


def test_every_event_kind_is_in_the_union() -> None:
    union = next(line for line in typescript().splitlines() if line.startswith("export type Event = "))
    for cls in EVENT_TYPES:
        assert f'  kind: "{cls.kind}";' in typescript()
        assert cls.__name__ in union


def test_floats_may_be_named_non_finite_values() -> None:
    assert "  norms: Float[];" in typescript()
    assert "  val_loss: Float | null;" in typescript()
    assert "  layers: LayerAnomaly[];" in typescript()
    assert "  model_config: Record<string, number | Float | boolean | string | null>;" in typescript()


def test_the_form_knows_the_bounds_of_the_specification() -> None:
    line = next(line for line in typescript().splitlines() if line.startswith('  "training.batch_size"'))
    assert '"minimum": 1' in line
    assert '"maximum": 4096' in line
    assert '"default": 8' in line


def test_bounds_beyond_a_javascript_number_are_left_out() -> None:
    line = next(line for line in typescript().splitlines() if line.startswith('  "training.seed"'))
    assert '"minimum": 0' in line
    assert "maximum" not in line.replace("minimum", "")


def test_a_type_without_a_counterpart_is_refused_and_a_union_in_a_list_is_put_in_brackets() -> None:
    with pytest.raises(TypeError, match="no TypeScript for set"):
        _type(set[int])
    assert _type(tuple[int | None, ...]) == "(number | null)[]"
