"""The prepared corpus: contents, determinism, reuse, and what happens when something is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from hl_scale.conditions import typology
from hl_scale.config import DialectDataConfig
from hl_scale.data import corpus as corpus_module
from hl_scale.data.corpus import load_corpus, prepare_corpus
from hl_scale.data.dialects import DialectEngine, Transformed
from hl_scale.data.durable import hash_file
from hl_scale.data.generation import STANDARD, VIRTUAL, DialectActor, RowPlan, counter
from hl_scale.data.shards import CorpusError

NIGERIAN = "Nigerian English"
AAVE = "Urban African American Vernacular English"
Build = Callable[..., DialectDataConfig]


class Calls:
    """Counts in-process transformations; `fail` says which (text, variety vector) is to fail."""

    count = 0
    fail: Callable[[str, np.ndarray], bool] = staticmethod(lambda text, vector: False)


@pytest.fixture
def in_process(engine: DialectEngine, monkeypatch) -> Calls:
    """Runs the actor's own code in this process, in batches of 5 sentences, with the session's engine."""
    calls = Calls()

    class Engine:
        unavailable_rules = engine.unavailable_rules

        def transform(self, text: str, vector: np.ndarray, seed: int) -> Transformed:
            calls.count += 1
            return (
                Transformed(text, (), "made to fail")
                if calls.fail(text, vector)
                else engine.transform(text, vector, seed)
            )

    def run(
        sentences: pa.Table, plan: RowPlan, *, num_workers: int, directory: str, unavailable: Mapping[str, str]
    ) -> Iterator[pa.Table]:
        actor = DialectActor.__new__(DialectActor)
        actor._plan, actor._engine = plan, Engine()  # type: ignore[assignment]
        for first in range(0, sentences.num_rows, 5):
            yield actor(sentences.slice(first, 5))

    monkeypatch.setattr(corpus_module, "transform_sentences", run)
    return calls


def shard_hashes(directory: str | Path) -> dict[str, str]:
    return {path.name: hash_file(path) for path in Path(directory).glob("*.parquet")}


def test_two_ray_workers_write_the_same_bytes_as_one_process(
    data_config: Build, tmp_path, in_process, monkeypatch
) -> None:
    one = data_config(directory=str(tmp_path / "one"))
    prepare_corpus(one)
    monkeypatch.undo()
    two = data_config(directory=str(tmp_path / "two"), num_workers=2)
    prepare_corpus(two)
    assert shard_hashes(one.directory) == shard_hashes(two.directory)
    assert load_corpus(one.directory).manifest == load_corpus(two.directory).manifest


def test_virtual_rows_hold_mixtures_identities_and_every_evaluation_variety(data_config: Build, in_process) -> None:
    data = data_config(variants_per_sentence=3, identity_per_sentence=2)
    prepare_corpus(data)
    corpus = load_corpus(data.directory)
    assert len(corpus.train) == 8 * 5 and [pair.pair_id for pair in corpus.train] == list(range(40))
    identities = [pair for pair in corpus.train if pair.variety == STANDARD]
    mixtures = [pair for pair in corpus.train if pair.variety == VIRTUAL]
    assert len(identities) == 16 and len(mixtures) == 24
    assert all(not pair.vector.any() and not pair.changed for pair in identities)
    assert len({pair.vector.tobytes() for pair in mixtures}) == 24
    assert not any(pair.vector[~typology.implementable_features()].any() for pair in mixtures)
    assert sum(pair.changed for pair in mixtures) > 12
    assert corpus.heldout_varieties == (AAVE, NIGERIAN)
    for name in corpus.heldout_varieties:
        pairs = corpus.heldout(name)
        assert len(pairs) == 4
        for pair in pairs:
            np.testing.assert_array_equal(pair.vector, typology.vector(name))
    assert corpus.heldout("nge") == corpus.heldout(NIGERIAN)
    assert [pair.standard for pair in corpus.heldout("standard")] == [
        pair.standard for pair in corpus.heldout(NIGERIAN)
    ]
    assert not any(pair.changed or pair.vector.any() for pair in corpus.heldout("standard"))


def test_named_rows_hold_each_training_variety_and_nothing_else(data_config: Build, in_process) -> None:
    data = data_config(mode="named", training_varieties=("HKE", "IndE"), identity_per_sentence=1)
    prepare_corpus(data)
    corpus = load_corpus(data.directory)
    assert [pair.variety for pair in corpus.train[:3]] == ["Hong Kong English", "Indian English", STANDARD]
    assert len(corpus.train) == 24


def test_no_held_out_sentence_is_trained_on(data_config: Build, in_process) -> None:
    data = data_config()
    prepare_corpus(data)
    corpus = load_corpus(data.directory)
    heldout = {pair.standard for name in (*corpus.heldout_varieties, "standard") for pair in corpus.heldout(name)}
    assert not heldout & {pair.standard for pair in corpus.train}
    assert not {pair.sentence_id for pair in corpus.heldout("standard")} & {pair.sentence_id for pair in corpus.train}


def test_mixtures_have_the_configured_density_and_the_three_values(data_config: Build) -> None:
    plan = RowPlan.from_config(data_config(minimum_density=0.2, maximum_density=0.4))
    vectors = np.stack([plan.mixture("text", copy) for copy in range(400)])
    density = (vectors > 0).sum(axis=1) / typology.implementable_features().sum()
    values, counts = np.unique(vectors[vectors > 0], return_counts=True)
    np.testing.assert_array_equal(values, np.array([0.3, 0.6, 1.0], dtype=np.float32))
    assert np.all(np.abs(counts / counts.sum() - 1 / 3) < 0.02)
    assert abs(density.mean() - 0.3) < 0.01 and 0.04 < density.std() < 0.09


def test_rows_of_a_sentence_do_not_depend_on_its_place_or_on_the_size_of_the_corpus(data_config: Build) -> None:
    small, large = RowPlan.from_config(data_config()), RowPlan.from_config(data_config(training_sentences=100))
    for first, second in zip(small.rows("train", 0, "text"), large.rows("train", 57, "text"), strict=True):
        assert (first.variety, first.seed) == (second.variety, second.seed)
        np.testing.assert_array_equal(first.vector, second.vector)


def test_row_numbers_are_unique_and_without_gaps(data_config: Build) -> None:
    plan = RowPlan.from_config(data_config())
    numbers = [row.pair_id for split, count in (("train", 8), ("heldout", 4)) for i in range(count)
               for row in plan.rows(split, i, "text")]  # fmt: skip
    assert numbers == list(range(8 * 3 + 4 * 2))


def test_counters_separate_their_parts() -> None:
    assert len({counter("a", "bc"), counter("ab", "c"), counter("a", "bc", 0), counter(0, "a", "bc")}) == 4


def test_the_manifest_counts_what_is_in_the_shards(data_config: Build, in_process) -> None:
    manifest = prepare_corpus(data_config()).manifest
    corpus = load_corpus(data_config().directory)
    assert manifest == corpus.manifest
    assert manifest["rows"] == {"planned": 32, "written": 32, "failed": 0}
    assert [shard["rows"] for shard in manifest["shards"]["train"]] == [10, 10, 4]
    virtual = [pair for pair in corpus.train if pair.variety == VIRTUAL]
    counts = manifest["varieties"]["train"][VIRTUAL]
    assert counts["changed"] == sum(pair.changed for pair in virtual)
    assert counts["rules_fired"] == sum(len(pair.rules) for pair in virtual)
    assert sum(manifest["rules"]["train"].values()) == counts["rules_fired"]
    assert "anaphoric_it" in manifest["unavailable_rules"]
    assert manifest["splits"]["heldout"] | {"sha256": ""} == {
        "sentences": 4, "first_sentence_id": 0, "last_sentence_id": 3, "sha256": ""
    }  # fmt: skip


def test_the_same_settings_are_reused_and_other_settings_build_anew(data_config: Build, in_process) -> None:
    assert not prepare_corpus(data_config()).reused
    done = in_process.count
    assert prepare_corpus(data_config()).reused
    assert prepare_corpus(data_config(num_workers=3, maximum_tokens=64)).reused
    assert in_process.count == done
    assert not prepare_corpus(data_config(seed=1)).reused
    assert not prepare_corpus(data_config(seed=1), force=True).reused
    assert in_process.count == 3 * done


def test_a_changed_source_builds_anew(data_config: Build, in_process) -> None:
    data = data_config()
    prepare_corpus(data)
    source = Path(str(data.sources[0].path))
    source.write_text(
        source.read_text() + json.dumps({"text": "One more sentence was written into the source file now."})
    )
    assert not prepare_corpus(data).reused


def test_failed_rows_are_left_out_and_recorded_with_their_reason(data_config: Build, in_process) -> None:
    in_process.fail = lambda text, vector: np.array_equal(vector, typology.vector(NIGERIAN)) and "bus" not in text and (
        "village" in text or "teachers" in text or "children" in text or "woman" in text or "movie" in text
        or "money" in text or "problem" in text or "raining" in text
    )  # fmt: skip
    data = data_config(heldout_sentences=8, training_sentences=4)
    manifest = prepare_corpus(data).manifest
    corpus = load_corpus(data.directory)
    failed = manifest["rows"]["failed"]
    assert failed > 0 and manifest["failures"]["reasons"] == {"made to fail": failed}
    assert {row["variety"] for row in manifest["failures"]["first"]} == {NIGERIAN}
    assert len(corpus.heldout(NIGERIAN)) == 8 - failed and len(corpus.heldout(AAVE)) == 8
    assert manifest["varieties"]["heldout"][NIGERIAN]["failed"] == failed


def test_a_variety_whose_every_row_fails_stops_and_leaves_the_old_corpus(data_config: Build, in_process) -> None:
    prepare_corpus(data_config())
    before = shard_hashes(data_config().directory)
    in_process.fail = lambda text, vector: np.array_equal(vector, typology.vector(NIGERIAN))
    with pytest.raises(CorpusError, match="every row of Nigerian English failed; most often: made to fail"):
        prepare_corpus(data_config(seed=1))
    assert shard_hashes(data_config().directory) == before
    assert load_corpus(data_config().directory).manifest["seed"] == 0


def test_an_interrupted_run_leaves_nothing_behind(data_config: Build, in_process, tmp_path) -> None:
    def interrupt(text: str, vector: np.ndarray) -> bool:
        raise KeyboardInterrupt

    in_process.fail = interrupt
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(data_config())
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_folder_that_is_not_a_corpus_is_never_replaced(data_config: Build, in_process, tmp_path) -> None:
    precious = tmp_path / "corpus"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    (precious / "manifest.json").write_text("{}")  # of something else
    with pytest.raises(CorpusError, match="holds other files than a corpus; it is left alone"):
        prepare_corpus(data_config())
    assert (precious / "thesis.tex").read_text() == "years of work"
    assert in_process.count == 0


def test_loading_where_nothing_was_prepared_says_to_prepare(tmp_path) -> None:
    with pytest.raises(CorpusError, match="does not exist\n  fix: hl-scale prepare"):
        load_corpus(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match=r"has no manifest\.json"):
        load_corpus(tmp_path)


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_shard_is_named_and_built_anew(data_config: Build, in_process, damage: str) -> None:
    data = data_config()
    prepare_corpus(data)
    intact = shard_hashes(data.directory)
    path = Path(data.directory) / "train-00001.parquet"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    with pytest.raises(
        CorpusError, match=r"train-00001\.parquet: (its sha256|\d+ bytes|missing)[\s\S]*fix: hl-scale prepare"
    ):
        load_corpus(data.directory)
    assert not prepare_corpus(data).reused
    assert shard_hashes(data.directory) == intact


@pytest.mark.parametrize(
    ("content", "message"), [("{", "damaged"), ("[]", "damaged"), ('{"format_version": 99}', "format version 99")]
)
def test_a_manifest_that_cannot_be_read_is_refused(tmp_path, content: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(CorpusError, match=message):
        load_corpus(tmp_path)


def test_held_out_pairs_of_an_absent_variety_name_those_that_are_there(data_config: Build, in_process) -> None:
    prepare_corpus(data_config())
    with pytest.raises(CorpusError, match="no held-out sentences in Welsh English\n  there: standard; Urban"):
        load_corpus(data_config().directory).heldout("Welsh English")


def test_an_unknown_variety_is_refused_before_any_work(data_config: Build, in_process) -> None:
    with pytest.raises(typology.UnknownVarietyError, match="Nigerian English"):
        prepare_corpus(data_config(evaluation_varieties=("Nigerien English",)))
    assert in_process.count == 0


def test_standard_english_cannot_be_a_named_training_variety(data_config: Build) -> None:
    with pytest.raises(CorpusError, match=r"data\.identity_per_sentence"):
        RowPlan.from_config(data_config(mode="named", training_varieties=("standard",)))
