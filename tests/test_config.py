"""The configuration: overlays, the hash of all that is in it, and one line for every mistake."""

import pytest
import yaml

from opd_bench.config import load, overlaid, read_yaml, size, tiers
from opd_bench.errors import UserError


@pytest.mark.parametrize("name", ["smoke", "quick", "controls"])
def test_every_tier_is_valid_in_every_smaller_size(name):
    for tier in tiers():
        whole, smaller = load(tier, []), load(tier, [size(name)])
        assert whole.tier == tier
        assert smaller.budget.axis == "flops"
        assert smaller.limit < whole.limit or whole.budget.axis != "flops"


def test_the_last_overlay_wins_key_by_key():
    config = load("embedded", [{"evaluation": {"limit": 5, "batch_size": 7}}, {"evaluation": {"limit": 6}}, {"seeds": 3}])
    assert (config.evaluation.limit, config.evaluation.batch_size, config.seeds) == (6, 7, 3)


def test_a_selection_of_methods_keeps_the_options_given_before():
    base = {"methods": {"sft": {"epochs": 2}, "opd": None}}
    assert overlaid(base, {"methods": {"sft": {}, "mine": None}})["methods"] == {"sft": {"epochs": 2}, "mine": {}}


def test_a_method_like_another_takes_the_settings_that_every_method_has_and_keeps_its_own():
    base = {"methods": {"opd": {"lr": 3e-4, "batch": 16, "divergence": "jsd"}, "sft": {"lr": 1e-3, "epochs": 2}, "kd": None}}
    over = {"methods": {"mine": {"method": "opd", "like": "opd"}, "sft": {"like": "opd", "batch": 4}, "kd": {"like": "kd", "lr": 1.0}}}
    assert overlaid(base, over)["methods"] == {
        "mine": {"method": "opd", "lr": 3e-4, "batch": 16},
        "sft": {"lr": 3e-4, "batch": 4, "epochs": 2},
        "kd": {"lr": 1.0},
    }


def test_weights_that_sum_to_zero_but_for_rounding_are_contrasts_and_a_file_goes_by_its_stem():
    methods = {"sft": {}, "opd": {}, "offline_kd": {}, "some/mine.py": {}}
    weights = {**dict.fromkeys(("sft", "opd", "offline_kd"), 1 / 3), "mine": -1}
    assert load("embedded", [{"methods": methods, "contrasts": {"x": weights}}]).contrasts == {"x": weights}


def test_a_method_of_weight_zero_has_no_part_in_a_contrast():
    declared = [{"contrasts": {"x": {"sft": 1, "opd": -1}}}, {"contrasts": {"x": {"opd": 0, "offline_kd": -1}}}]  # the second replaces opd
    assert load("embedded", declared).contrasts == {"x": {"sft": 1, "offline_kd": -1}}


def test_overlaying_changes_neither_side():
    base, over = {"a": {"b": 1}}, {"a": {"c": 2}, "methods": {"sft": None}}
    overlaid(base, over)
    assert (base, over) == ({"a": {"b": 1}}, {"a": {"c": 2}, "methods": {"sft": None}})


def test_the_digest_tells_configurations_apart_and_nothing_else():
    same = [load("embedded", [{"seeds": 3}]), load("embedded", [{"seeds": 5}, {"seeds": 3}])]
    assert same[0].digest == same[1].digest
    contrast = {"contrasts": {"x": {"sft": 1, "opd": -1}}}
    others = [contrast, {"seeds": 4}, {"budget": {"limit": 2e12}}, {"methods": {"sft": {"lr": 2e-3}}}, {"judge": {"yes": "ja"}}]
    assert len({load("embedded", [{"seeds": 3}, other]).digest for other in [{}, *others]}) == 6


@pytest.mark.parametrize(
    ("overlay", "said"),
    [
        ({"sedes": 3}, r"unknown key 'sedes' \(did you mean 'seeds'\?\)"),
        ({"evaluation": {"limt": 3}}, r"unknown key 'evaluation\.limt' \(did you mean 'limit'\?\)"),
        ({"seeds": "many"}, "seeds: .*integer"),
        ({"seeds": 0}, "seeds: .*greater"),
        ({"budget": 5}, "budget: .*dictionary"),
        ({"budget": {"limit": -1}}, r"budget\.limit: .*greater"),
        ({"budget": {"limit": float("inf")}}, r"budget\.limit: .*finite"),
        ({"budget": {"axis": "tokens"}}, r"budget\.axis: .*'flops'"),
        ({"budget": {"axis": "dollars"}}, r"budget: budget\.prices and the axis dollars need each other"),
        ({"gates": {"overlaps": 0.1}}, r"unknown key 'gates\.overlaps' \(did you mean 'overlap'\?\)"),
        ({"methods": {}}, "methods: .*at least 1"),
        ({"methods": ["sft"]}, "methods: .*dictionary"),
        ({"methods": {"sft": 3}}, r"methods\.sft: .*dictionary"),
        ({"students": None}, "students: .*list"),
        ({"students": []}, "students: .*at least 1"),
        ({"contrasts": {"x": {"sft": 1, "odp": -1}}}, r"contrasts: 'x' names 'odp', .* \(did you mean 'opd'\?\)"),
        ({"methods": {"sft": {}}, "contrasts": {"x": {"sft": 1, "opd": -1}}}, r"contrasts: 'x' names 'opd', .* \(known: sft\)"),
        ({"contrasts": {"x": {"sft": 1, "opd": -0.5}}}, r"contrasts: the weights of 'x' sum to 0\.5; they must sum to 0"),
        ({"contrasts": {"x": {"sft": 1}}}, "contrasts: 'x' compares nothing: .*two methods"),
        ({"contrasts": {"x": {"sft": 0, "opd": 0}}}, "contrasts: 'x' compares nothing: .*two methods"),
        ({"contrasts": {"x": {}}}, "contrasts: 'x' compares nothing: .*two methods"),
        ({"contrasts": {"x": {"sft": "much", "opd": -1}}}, r"contrasts\.x\.sft: .*number"),
        ({"contrasts": {"x": {"sft": float("inf"), "opd": -1}}}, r"contrasts\.x\.sft: .*finite"),
        ({"contrasts": ["x"]}, "contrasts: .*dictionary"),
        ({"methods": {"mine": {"like": "odp"}}}, r"methods: there is no 'odp' .*\(did you mean 'opd'\?\)"),
        ({"notes": "said"}, "notes: .*list"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(overlay, said):
    with pytest.raises(UserError, match=f"^configuration: {said}") as caught:
        load("embedded", [overlay])
    assert "\n" not in str(caught.value)


def test_an_unknown_tier_is_named():
    with pytest.raises(UserError, match=r"unknown tier 'embeded' \(did you mean 'embedded'\?\)"):
        load("embeded", [])


def test_a_recipe_for_another_tier_is_refused():
    with pytest.raises(UserError, match="this configuration is for the tier smol, not embedded; give --tier smol"):
        load("embedded", [{"tier": "smol", "methods": {"sft": {"lr": 1e-3}}}])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"seeds: [1, 2", "not valid YAML"),
        (b"- seeds\n- 3\n", "must hold a mapping"),
        (b"", "must hold a mapping"),
        (b"seeds: \xff\xfe", "not UTF-8"),
        (None, "cannot read .*No such file"),
    ],
)
def test_a_file_that_holds_no_configuration_is_named(tmp_path, content, said):
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value)


def test_a_value_that_only_yaml_knows_has_a_digest_too(tmp_path):
    (tmp_path / "mine.yaml").write_text("methods: {sft: {lr: 2020-01-01}}", encoding="utf-8")
    assert load("embedded", [read_yaml(tmp_path / "mine.yaml")]).digest


def test_what_a_manifest_keeps_is_the_configuration_again():
    config = load("embedded", [{"methods": {"sft": {"lr": 1e-3}}}])
    assert type(config)(**yaml.safe_load(config.model_dump_json())) == config
