"""The dialect evaluation on a tiny model: identities, an independent computation, and refusals."""

from __future__ import annotations

import copy
import dataclasses
import json

import geomloss
import numpy as np
import pytest
import torch

from hl_scale.base import TaskAdapter
from hl_scale.base.adapted import slot_at
from hl_scale.conditions import typology
from hl_scale.config import Config
from hl_scale.data.corpus import Pair
from hl_scale.evaluation import EvaluationError, evaluate_dialects, measurement, save
from hl_scale.evaluation.controls import CONTROLS, TrainingConditions, condition_vectors, wrong_variety
from hl_scale.evaluation.measurement import CloudStatistics, Measurer, cloud_statistics, delta_gram
from hl_scale.evaluation.statistics import SentenceBootstrap
from hl_scale.evaluation.summaries import DialectValues, added_divergence, retrieved
from hl_scale.lora import LoraFactors, Slot, SummedFactors
from hl_scale.objectives.alignment import AlignmentObjective

ALL = ["own", *CONTROLS]


@pytest.fixture
def result(evaluated):
    return copy.deepcopy(evaluated)


def with_data(run, **changes):
    tree = run.config.model_dump()
    tree["data"].update(changes)
    return dataclasses.replace(run, config=Config.model_validate(tree))


def state_by_state_divergence(run, factors, dialect, standard, standard_factors=None):
    """One sentence, no batching and no padding, float64 GeomLoss: the definition written out."""

    def cloud(text, with_factors):
        ids = torch.tensor([run.base.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            hidden = run.base.hidden_states(ids, torch.ones_like(ids), with_factors)
        return hidden[0, 1:].double() / hidden.shape[-1] ** 0.5

    loss = geomloss.SamplesLoss("sinkhorn", p=2, blur=0.05, scaling=0.5, backend="tensorized")
    with torch.no_grad():
        return loss(cloud(dialect, factors), cloud(standard, standard_factors)).item()


def test_ratios_equal_a_sentence_by_sentence_computation_with_geomloss(make_run, corpus, result):
    run = make_run()
    name = "Chicano English"
    row = next(row for row in result["dialects"] if row["variety"] == name)
    vectors = condition_vectors(name, list(corpus.heldout_varieties), TrainingConditions.of(corpus.train), seed=0)
    for condition in ("own", "zero", "mean_training", "shuffled", "wrong"):
        factors = run.hypernetwork(torch.tensor(vectors[condition])[None])
        adapted = [state_by_state_divergence(run, factors, p.dialect, p.standard) for p in corpus.heldout(name)]
        base = [state_by_state_divergence(run, None, p.dialect, p.standard) for p in corpus.heldout(name)]
        assert row["ratio"][condition]["value"] == pytest.approx(np.mean(adapted) / np.mean(base), rel=2e-4)
        assert abs(row["ratio"][condition]["value"] - 1) > 1e-3
    assert row["base_divergence"]["value"] == pytest.approx(np.mean(base), rel=2e-4)


@pytest.fixture
def on_task():
    """on_task(run, seed) -> the run as if it had been trained on top of a random task adapter for other layers too."""

    def carry(run, seed=0):
        generator = torch.Generator().manual_seed(seed)
        layers = {path: layer for path, layer in run.base.linears.items() if path.endswith(("q_proj", "up_proj"))}
        a = {path: 0.3 * torch.randn(1, 2, layer.in_features, generator=generator) for path, layer in layers.items()}
        b = {path: 0.3 * torch.randn(1, layer.out_features, 2, generator=generator) for path, layer in layers.items()}
        factors = LoraFactors(tuple(slot_at(path, layer) for path, layer in layers.items()), a, b, 0.7)
        task = TaskAdapter("task", factors, f"{seed}" * 64)
        return dataclasses.replace(run, task_adapter=task, task_adapter_fingerprint=task.fingerprint)

    return carry


def test_on_top_of_a_task_adapter_all_states_carry_it(make_run, corpus, on_task):
    run = on_task(make_run())
    fixed = run.task_adapter.factors
    name = "Chicano English"
    result = evaluate_dialects(run, corpus, progress=False)
    row = next(row for row in result["dialects"] if row["variety"] == name)
    own = run.hypernetwork(torch.tensor(typology.vector(name))[None])
    adapted, base = (
        np.mean([state_by_state_divergence(run, f, p.dialect, p.standard, fixed) for p in corpus.heldout(name)])
        for f in (SummedFactors(own, fixed.rescaled(own.scale)), fixed)
    )
    assert row["base_divergence"]["value"] == pytest.approx(base, rel=2e-4)
    assert row["ratio"]["own"]["value"] == pytest.approx(adapted / base, rel=2e-4)
    plain = evaluate_dialects(make_run(), corpus, progress=False)
    losses = [each["standard_english"]["language_model_loss"]["loss"]["base"]["value"] for each in (result, plain)]
    assert abs(losses[0] - losses[1]) > 1e-3
    assert result["provenance"]["run"]["task_adapter_fingerprint"] == "0" * 64
    assert "task_adapter" not in plain["provenance"]["run"]


@pytest.mark.parametrize("seed", [None, 1])
def test_a_control_on_another_task_adapter_or_on_none_is_refused(make_run, corpus, on_task, seed):
    control = make_run("plain_lora")
    with pytest.raises(EvaluationError, match=r"with the same lora\.task_adapter"):
        evaluate_dialects(
            on_task(make_run()), corpus, control=control if seed is None else on_task(control, seed), progress=False
        )


def test_an_adapter_that_does_nothing_has_ratio_one_and_does_no_damage(make_run, corpus):
    run = make_run(spread=0.0)
    result = evaluate_dialects(run, corpus, progress=False)
    for row in result["dialects"]:
        for estimate in row["ratio"].values():
            assert (estimate["low"], estimate["value"], estimate["high"]) == pytest.approx((1, 1, 1), abs=1e-5)
        assert max(abs(e["value"]) for e in row["difference"].values()) < 1e-5
    assert result["standard_english"]["divergence"]["zero"]["maximum"] < 1e-5
    assert result["standard_english"]["language_model_loss"]["added"]["zero"]["value"] == pytest.approx(0, abs=1e-6)
    assert result["adapters"]["delta_norm"] == [0.0] * 4
    assert result["adapters"]["delta_cosine"][0][1] is None


def test_batch_size_changes_nothing(make_run, corpus, result):
    alone = evaluate_dialects(make_run(evaluation={"batch_size": 1}), corpus, progress=False)
    for one, many in zip(alone["dialects"], result["dialects"], strict=True):
        assert one["ratio"]["own"]["value"] == pytest.approx(many["ratio"]["own"]["value"], rel=1e-4)
        assert one["ratio"]["own"]["high"] == pytest.approx(many["ratio"]["own"]["high"], rel=1e-4)


def test_every_row_holds_every_condition_and_the_parts_add_up(corpus, result):
    assert [row["variety"] for row in result["dialects"]] == list(corpus.heldout_varieties)
    for row in result["dialects"]:
        assert list(row["ratio"]) == ALL
        assert list(row["difference"]) == list(CONTROLS)
        assert row["changed"]["sentences"] + row["unchanged"]["sentences"] == row["sentences"]
        assert row["unchanged"]["sentences"] == 4
        gap = row["ratio"]["zero"]["value"] - row["ratio"]["own"]["value"]
        assert row["difference"]["zero"]["value"] == pytest.approx(gap)
        # All base divergence comes from changed sentences; the total is their part plus what the unchanged ones add.
        total = row["base_divergence"]["value"] * row["sentences"]
        own = row["changed"]["ratio"]["own"]["value"] * total + 4 * row["unchanged"]["added_divergence"]["own"]["value"]
        assert own / total == pytest.approx(row["ratio"]["own"]["value"], rel=1e-4)
    assert [row["sentences"] for row in result["dialects"]] == [12, 12, 11]


def test_averages_are_over_the_dialects_of_their_group(result):
    assert result["averages"]["seen"] is None
    average = result["averages"]["unseen"]
    assert average["dialects"] == [row["variety"] for row in result["dialects"]]
    expected = np.mean([row["ratio"]["own"]["value"] for row in result["dialects"]])
    assert average["ratio"]["own"]["value"] == pytest.approx(expected)


def test_named_training_varieties_are_marked_as_seen(make_run, corpus):
    vector = typology.vector("Chicano English")
    corpus.train = [Pair(0, 0, "Chicano English", vector, "a", "b", ()), corpus.train[-1]]
    rows = {row["variety"]: row for row in evaluate_dialects(make_run(), corpus, progress=False)["dialects"]}
    assert [name for name, row in rows.items() if row["seen"]] == ["Chicano English"]
    assert rows["Chicano English"]["coverage"]["binary"] == 1.0
    assert 0 < rows["Nigerian English"]["coverage"]["binary"] < 1


def test_fewer_sentences_are_the_same_for_all_dialects_and_the_result_says_so(make_run, corpus, result):
    assert result["reduced"] == []
    reduced = evaluate_dialects(make_run(evaluation={"sentences": 6}), corpus, progress=False)
    assert reduced["reduced"] == ["6 of 12 held-out sentences"]
    assert reduced["sentences"] == {"used": 6, "available": 12}
    assert reduced["standard_english"]["sentences"] == 6


def test_the_language_model_loss_is_that_of_transformers_per_token(make_run, corpus, result):
    run = make_run()
    total = tokens = 0.0
    for pair in corpus.heldout("standard"):
        ids = torch.tensor([run.base.tokenizer(pair.standard)["input_ids"]])
        with torch.no_grad():
            total += run.base.model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    measured = result["standard_english"]["language_model_loss"]
    assert measured["tokens"] == tokens
    assert measured["loss"]["base"]["value"] == pytest.approx(total / tokens, rel=1e-5)
    assert set(measured["added"]) == {"zero", "plain_lora"}


def test_logits_are_computed_in_chunks_of_bounded_size(make_run, corpus, monkeypatch):
    run = make_run()
    measurer = Measurer(run.base, AlignmentObjective(run.config.objective), batch_size=12)
    tokens = measurer.tokenize([pair.standard for pair in corpus.heldout("standard")])
    whole, _ = measurer.language_model_losses(tokens, None)
    sizes = []
    original = run.base.logits

    def spy(*arguments):
        logits = original(*arguments)
        sizes.append(logits.numel() * 4)
        return logits

    monkeypatch.setattr("hl_scale.evaluation.measurement.LOGIT_BYTES", 5000)
    monkeypatch.setattr(run.base, "logits", spy)
    chunked, _ = measurer.language_model_losses(tokens, None)
    assert max(sizes) <= 5000
    assert chunked == pytest.approx(whole, rel=1e-5)


def test_originals_are_found_with_and_without_adapters(result):
    for row in result["dialects"]:
        assert set(row["retrieval"]) == {"base", "own", "plain_lora"}
        assert all(0 <= part["low"] <= part["value"] <= part["high"] <= 1 for part in row["retrieval"].values())
        assert row["retrieval"]["base"]["value"] > 0.5  # of a dialect, whose sentences are mostly the originals


def test_the_result_is_plain_json_and_survives_saving(result, tmp_path):
    path = save(result, tmp_path)
    assert json.loads(path.read_text()) == result
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_file()] == ["evaluation.json"]


def test_provenance_names_run_budget_base_corpus_and_machine(result):
    provenance = result["provenance"]
    assert provenance["run"]["training_pairs"] == 40
    assert provenance["run"]["base_fingerprint"] == "f" * 64
    assert provenance["control"]["hypernetwork"] == "plain_lora"
    assert provenance["corpus"]["fingerprint"] == "c" * 64
    assert provenance["environment"]["versions"]["torch"]
    assert provenance["wall_seconds"] > 0


def test_without_a_plain_lora_the_column_is_missing_and_a_caveat_says_so(make_run, corpus):
    result = evaluate_dialects(make_run(), corpus, progress=False)
    assert "plain_lora" not in result["dialects"][0]["ratio"]
    assert any("plain LoRA" in caveat for caveat in result["caveats"])


def test_that_text_is_made_by_rules_is_said_of_text_that_rules_made(make_run, corpus, result):
    parallel = with_data(make_run(), mode="parallel", sources=[], pairs=[{"kind": "jsonl", "path": "pairs.jsonl"}])
    assert any("made by rules" in caveat for caveat in result["caveats"])
    caveats = evaluate_dialects(parallel, corpus, progress=False)["caveats"]
    assert caveats and not any("made by rules" in caveat for caveat in caveats)


def test_another_budget_of_the_control_is_a_caveat(make_run, corpus):
    control = dataclasses.replace(make_run("plain_lora"), step=7)
    caveats = evaluate_dialects(make_run(), corpus, control=control, progress=False)["caveats"]
    assert any("40 training pairs for this run, 28" in caveat for caveat in caveats)


@pytest.mark.parametrize(("rank", "entries"), [(2, 1 << 24), (2, 40), (7, 1 << 24), (7, 40)])
def test_delta_gram_equals_the_inner_products_of_formed_updates_however_it_is_cut(monkeypatch, rank, entries):
    monkeypatch.setattr(measurement, "GRAM_ENTRIES", entries)
    slots = (Slot(0, "q_proj", "0.q_proj", 9, 14), Slot(0, "v_proj", "0.v_proj", 9, 5))
    generator = torch.Generator().manual_seed(1)
    a = {s.path: torch.randn(5, rank, s.in_features, generator=generator) for s in slots}
    b = {s.path: torch.randn(5, s.out_features, rank, generator=generator) for s in slots}
    deltas = torch.cat([(0.5 * b[s.path].double() @ a[s.path].double()).flatten(1) for s in slots], dim=1)
    found = delta_gram(LoraFactors(slots, a, b, 0.5))
    assert found == pytest.approx((deltas @ deltas.T).numpy(), rel=1e-9)


def test_added_divergence_is_what_the_adapter_adds_to_the_base():
    values = {"base": np.array([0.1, 0.3]), "own": np.array([0.4, 0.5])}
    dialect = DialectValues("x", np.array([2, 0]), np.array([False, False]), values)
    found = added_divergence(dialect, SentenceBootstrap(3, samples=200))
    assert found["added_divergence"]["own"]["value"] == pytest.approx(0.25)
    assert found["sentences"] == 2


def test_within_and_between_variance_add_up_to_the_total_variance():
    clouds = [torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)) + seed for seed in range(4)]
    statistics = cloud_statistics(clouds)
    points = torch.cat(clouds).double()
    total = (points - points.mean(dim=0)).square().sum(dim=1).mean().item()
    assert statistics.within.mean() + statistics.between == pytest.approx(total)


def test_a_sentence_is_retrieved_if_no_other_original_is_nearer_than_its_own():
    rng = np.random.default_rng(0)
    originals = rng.normal(size=(12, 3))
    near, middle = originals + 0.3 * rng.normal(size=(12, 3)), 0.01 * rng.normal(size=(12, 3)) + originals.mean(0)
    for means in (near, middle):
        expected = [
            all(np.linalg.norm(mean - originals[own]) <= np.linalg.norm(mean - other) for other in originals)
            for own, mean in enumerate(means)
        ]
        found = retrieved(CloudStatistics(np.zeros(12), means), CloudStatistics(np.zeros(12), originals))
        assert found.tolist() == [float(each) for each in expected]
    assert retrieved(CloudStatistics(np.zeros(12), originals), CloudStatistics(np.zeros(12), originals)).all()


def test_the_wrong_dialect_is_the_farthest_of_the_evaluated_ones():
    distances = {
        name: np.linalg.norm(typology.vector(name) - typology.vector("Nigerian English"))
        for name in ("Chicano English", "Jamaican English", "Indian English")
    }
    assert wrong_variety("Nigerian English", list(distances)) == max(distances, key=distances.get)
    alone = wrong_variety("Nigerian English", ["Nigerian English"])
    assert alone in typology.varieties()
    assert alone != "Nigerian English"


def test_the_shuffled_condition_keeps_the_values_and_moves_them(corpus):
    training = TrainingConditions.of(corpus.train)
    vectors = condition_vectors("Nigerian English", ["Nigerian English", "Indian English"], training, seed=3)
    again = condition_vectors("Nigerian English", ["Nigerian English", "Indian English"], training, seed=3)
    assert (np.sort(vectors["shuffled"]) == np.sort(vectors["own"])).all()
    assert (vectors["shuffled"] != vectors["own"]).any()
    assert (vectors["shuffled"] == again["shuffled"]).all()


def test_identity_pairs_do_not_enter_the_mean_training_vector(corpus):
    expected = np.mean([pair.vector for pair in corpus.train if pair.variety == "virtual"], axis=0)
    assert TrainingConditions.of(corpus.train).mean == pytest.approx(expected)


def test_a_sentence_longer_than_the_context_is_refused_by_name(make_run, corpus):
    with pytest.raises(EvaluationError, match=r"has 1[1-9] tokens, the model's context holds 10(.|\n)*fix"):
        evaluate_dialects(make_run(context=10), corpus, progress=False)


def test_a_variety_that_was_not_prepared_is_refused(make_run, corpus):
    run = with_data(make_run(), evaluation_varieties=("Nigerian English", "Welsh English"))
    with pytest.raises(EvaluationError, match=r"no held-out sentences for: Welsh English(.|\n)*hl-scale prepare"):
        evaluate_dialects(run, corpus, progress=False)


def test_an_unknown_variety_is_refused_with_the_closest_names(make_run, corpus):
    run = with_data(make_run(), evaluation_varieties=("Nigerian Englisch",))
    with pytest.raises(ValueError, match="Nigerian English"):
        evaluate_dialects(run, corpus, progress=False)


def test_a_control_that_is_no_plain_lora_or_has_another_base_is_refused(make_run, corpus):
    with pytest.raises(EvaluationError, match="expected 'plain_lora'"):
        evaluate_dialects(make_run(), corpus, control=make_run(), progress=False)
    control = make_run("plain_lora")
    control.base.fingerprint = "0" * 64
    with pytest.raises(EvaluationError, match="another base"):
        evaluate_dialects(make_run(), corpus, control=control, progress=False)


def test_a_corpus_that_the_run_was_not_trained_on_is_refused(make_run, corpus):
    run = dataclasses.replace(make_run(), data_fingerprint="e" * 64)
    with pytest.raises(EvaluationError, match="sentences held out there may have been trained on"):
        evaluate_dialects(run, corpus, progress=False)
