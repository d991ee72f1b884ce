"""One word for one thing: every column of every table is in the vocabulary, and in the docs."""

import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny import tiny_tokenizer

import spade_lens as sl
from spade_lens import exits, icl, training
from spade_lens.columns import COLUMNS, KEYS, MEASURES, PATTERNS
from spade_lens.exits.controls import beyond_fixed, match_fixed, outcomes
from spade_lens.exits.sweeps import iso_compute
from spade_lens.icl.geometry.dpca_projections import factor_projections
from spade_lens.prompts import Template, few_shot_prompt
from spade_lens.stats.frames import as_frame
from spade_lens.tasks import RuleTask
from spade_lens.training.in_context.network import NetworkSize

PAGE = Path(__file__).parents[1] / "docs" / "columns.md"
RULE = RuleTask("x/y", {"x": tuple("abcdefghijklm"), "y": tuple("nopqrstuvwxyz")})
SETUP = icl.PromptSetup(Template(pair="{input}>{output}", query="{input}>", separator=";"))

pytestmark = pytest.mark.filterwarnings("ignore:On task .* there is nothing to explain")


@pytest.fixture(scope="module")
def tables(
    tiny_llama: sl.Model, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, pd.DataFrame]:
    """What every maker of tables gives, on a tiny model."""
    model = tiny_llama
    pairs = [("a", "A"), ("b", "B")]
    prompts = [
        few_shot_prompt(tiny_tokenizer(), pairs, query, answer=answer, template=SETUP.template)
        for query, answer in zip("qrstuvwx", "ABABABAB", strict=True)
    ]
    options = tuple(model.tokenizer.convert_tokens_to_ids(["A", "B"]))
    prompts = [replace(prompt, candidates=options) for prompt in prompts]
    episodes = RULE.episodes(4, shots=2)
    rule, label = torch.arange(8) % 2, (torch.arange(8)[:, None] // 2 + torch.arange(2)) % 2
    vectors = torch.randn(3, 8, 2, 16)
    checks = [sl.LogitLens(model), sl.Spade(model)]
    [table, _] = exits.exit_tables(model, prompts, checks, layers=[1, 2, 3])
    thresholds = {"threshold": [exits.Threshold(level) for level in (0.9, 0.5)]}
    calibration = sl.calibrate(model, prompts, keep=sl.Keep(), layers=[1, 3])
    engine = exits.SpadeExit(model, "logit", exits.Threshold(0.0), layers=[1, 3])
    by_rule = sl.generation.ExitPrefill(engine)
    sets = [sl.Keep(name="answer"), sl.Keep(spans=("labels",), name="labels")]
    data = {"sft": prompts, "preferences": prompts, "held_out": (prompts, prompts)}
    phases = training.AlternatePlan(rounds=1, steps=1, layer=3)
    alternated = training.train_alternating(model, **data, plan=phases)
    made = {
        "readout": sl.read(prompts, ["logit", "spade"], model=model),
        "contributions": icl.measure_contributions(model, episodes, layers=[2], setup=SETUP),
        "shots": icl.accuracy_by_shots(model, [RULE], n=4, shots=[0, 1], setup=SETUP),
        "patching": icl.patch_sweep(model, episodes, layers=[2], setup=SETUP),
        "heads": icl.head_effects(model, RULE.episodes(8, shots=2), n=2, blocks=[1], setup=SETUP),
        "knockout": icl.knockout(model, prompts, windows=[(0, 4)]),
        "saliency": icl.saliency_flows(model, prompts),
        "sufficiency": icl.sufficiency_map(model, prompts, sets=sets, layers=[1]),
        "smallest sets": icl.smallest_sets(model, prompts[:2], layers=[1]),
        "convergence": icl.convergence(vectors, rule=rule, label=label, shuffles=2),
        "probes": icl.probe(vectors, label, folds=2),
        "factors": icl.factor_variance(vectors, rule=rule, label=label, shuffles=2, splits=2),
        "projections": factor_projections(vectors, rule=rule, label=label),
        "exit table": table,
        "exit trace": table.simulate(exits.FixedLayer(2)),
        "sweep": exits.sweep(table, thresholds["threshold"]),
        "calibration": calibration.tried(0.5),
        "equal compute": iso_compute(
            table.of(range(4)), table.of(range(4, 8)), thresholds, budgets=[2.0]
        ),
        "beyond fixed layers": pd.DataFrame(
            [
                beyond_fixed(
                    outcomes(table, exits.Threshold(0.5)),
                    match_fixed([table], 0.5).outcomes([table]),
                    match_fixed([table], 0.5),
                )
            ]
        ),
        "reliability": exits.reliability(table),
        "AUROC of a check": exits.check_auroc(table),
        "held out": sl.fit("l-spade", model, n_pieces=30, n_tokens=16, per_piece="all").held_out,
        "rule vectors": icl.rule_vectors(model, episodes, setup=SETUP),
        "residuals": sl.capture(model, prompts[:2]),
        "generated": sl.generate("ab", 3, model=model),
        "after an exit": sl.generate("ab", 3, model=model, strategy=by_rule),
        "searched": sl.generate(
            "ab", 3, model=model, strategy=sl.generation.Deal(lambda prompt, text: 0.0, 2, 1)
        ),
        "shortcuts": sl.generation.fit_shortcuts(
            model, 2, ["abcdefgh" * 9, "ijklmnop" * 9, "qrstuvwx" * 9], n_tokens=24
        ).held_out,
        "scores": sl.generation.score_text("ab", "cd", model=model),
        "answers": sl.generation.score_answers(prompts[:2], model=model),
        "training": training.train(
            (linear := torch.nn.Linear(2, 1)),
            lambda step: linear(torch.ones(2)).square().mean(),
            training.TrainPlan(2, warmup=1),
        ),
        "alternating training": alternated.history,
        "drift of blocks": alternated.drift,
        "decoded tokens": icl.decoded_tokens(model, torch.randn(3, 2, 2, 32), top_k=2),
    }
    frames = {name: as_frame(one) for name, one in made.items()}
    plan = sl.studies.SpeculationPlan(
        ["ab", "cd"],
        drafts=1,
        max_new_tokens=3,
        layers=1,
        rounds=1,
        out=tmp_path_factory.mktemp("s"),
    )
    swept = sl.study(model, plan).tables
    frames |= {f"speculation, {name}": table for name, table in swept.items()}
    small = {"prompts": 20, "paste_steps": 4, "training": training.TrainPlan(4, warmup=1)}
    in_context = sl.studies.InContextPlan(
        training.InContextTask(d_x=2, d_phi=2, examples=4),
        NetworkSize(2, 8, 2),
        out=tmp_path_factory.mktemp("i"),
        **small,
    )
    learned = sl.study(in_context).tables
    frames |= {f"learning in context, {name}": table for name, table in learned.items()}
    for name in ("readout", "patching", "knockout", "contributions"):
        frames[f"summary of {name}"] = sl.stats.summarise(frames[name])
    halves = frames["readout"].assign(task=frames["readout"]["prompt"] % 2)
    frames["summary over tasks"] = sl.stats.summarise(halves, over="tasks")
    return frames


def describe(column: str) -> str | None:
    """What a column means; None if it is not in the vocabulary."""
    for pattern, meaning in (COLUMNS | PATTERNS).items():
        form = pattern.replace("<k>", r"\d+").replace("<column>", r"(?P<column>\w+)")
        match = re.fullmatch(form, column)
        if match and all(name in COLUMNS for name in match.groupdict().values()):
            return meaning
    return None


def test_every_column_is_in_the_vocabulary(tables: dict[str, pd.DataFrame]) -> None:
    unknown = {
        name: [str(c) for c in frame.columns if describe(str(c)) is None]
        for name, frame in tables.items()
    }
    assert not {name: columns for name, columns in unknown.items() if columns}


def test_the_vocabulary_is_used(tables: dict[str, pd.DataFrame]) -> None:
    used = {str(column) for frame in tables.values() for column in frame.columns}
    # Nothing is listed that no table has, but for makers that are not run here.
    elsewhere = {
        "seed",
        "target_logit",
        "flips",
        "wanted",
        "confidence_wanted",
        "fixed",
        "bins",
        "quantile",
        "coverage",
        "squared_error",
        "size",
    }
    ids = {name for name in COLUMNS if name.endswith("_id") or name == "among"}
    assert set(COLUMNS) - used <= elsewhere | ids
    assert set(MEASURES) - {"flips"} <= used
    assert set(KEYS) - {"method"} <= used


def test_one_word_for_one_thing() -> None:
    assert set(KEYS) | set(MEASURES) <= set(COLUMNS)
    assert len(set(COLUMNS.values())) == len(COLUMNS)
    assert describe("top_3") and describe("candidate_2_logprob") and describe("speedup_low")
    assert describe("lens_name") is None
    for old in ("logit_difference", "spade", "concentration", "share"):
        assert describe(old) is None


def test_the_page_lists_the_vocabulary() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name, meaning in [*COLUMNS.items(), *PATTERNS.items()]:
        written = meaning.replace("|", "\\|")
        assert f"| `{name}` | {written} |" in page, name
