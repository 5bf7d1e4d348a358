"""analyze.py, analysis/clustering.py and analysis/plots.py on made-up records and tensors whose answer is known."""

import subprocess
import sys

import utils

import numpy as np
import pytest
import torch

import analyze
import embed
import runs
import study
from analysis import clustering, defences, plots, shift
from conftest import ROOT, arguments, done, fields, figure, refused, write_run
from runs import select
from study import COMPONENTS

# ---------------------------------------------------------------------------------------------------------------------
# clusters


def blobs(sizes, dim, apart, seed=0):
    """Gaussian blobs with centres `apart` from each other: (n, dim), which blob (n,)."""
    rng = np.random.default_rng(seed)
    centres = np.linalg.qr(rng.standard_normal((dim, len(sizes))))[0].T * apart
    which = np.repeat(np.arange(len(sizes)), sizes)
    return (centres[which] + rng.standard_normal((len(which), dim))).astype(np.float32), which


def people(n):
    labels = [
        {
            "gender": ["female", "male"][i % 2],
            "age": str(20 + i % 10),
            "transcript": "don't forget a jacket",
        }
        for i in range(n)
    ]
    return labels, [str(i % 7) for i in range(n)]


def value(records, metric, **wanted):
    (record,) = select(records, metric=metric, **wanted)
    return record["value"]


def test_a_poison_apart_is_a_cluster():
    x, which = blobs((300, 40), 32, 20.0)
    found = clustering.separability(x, which == 1, *people(340), "emotion", 2)
    assert value(found, "purity") == 1.0 and value(found, "recall") == 1.0
    assert value(found, "adjusted_rand", kind="poison") == 1.0
    assert abs(value(found, "adjusted_rand", kind="gender")) < 0.05
    assert value(clustering.whole_class(x, which == 1), "probe") > 0.99


def test_a_stronger_feature_hides_the_poison_from_two_clusters_and_not_from_four():
    rng = np.random.default_rng(1)
    gender, poisoned = np.arange(400) % 2, np.arange(400) >= 340
    x = rng.standard_normal((400, 32)).astype(np.float32)
    x[:, 0] += 40 * gender
    x[:, 1] += 15 * poisoned
    labels = [{"gender": ["female", "male"][g], "age": "25"} for g in gender]
    two, four = (
        clustering.separability(x, poisoned, labels, ["s"] * 400, "age", k) for k in (2, 4)
    )
    assert value(two, "adjusted_rand", kind="gender") == 1.0 and value(two, "purity") < 0.2
    assert value(four, "purity") == 1.0
    assert {r["value"] for r in select(two, of="female")} == {0.0, 1.0}


def test_without_structure_nothing_is_found():
    x, _ = blobs((400,), 32, 0.0)
    poisoned = np.random.default_rng(2).random(400) < 0.1
    found = clustering.whole_class(x, poisoned)
    assert value(found, "silhouette") < 0.10 and abs(value(found, "probe") - 0.5) < 0.15


def test_clusters_sum_up():
    x, which = blobs((50, 30, 20), 16, 15.0)
    records = clustering.composition(which, which == 2, people(100)[0], "age")
    assert [r["value"] for r in select(records, metric="cluster_size")] == [50, 30, 20]
    assert [r["value"] for r in select(records, of="poisoned")] == [0.0, 0.0, 1.0]
    for c in range(3):
        for kind in ("gender", "age"):
            shares = [r["value"] for r in select(records, cluster=c, kind=kind)]
            assert sum(shares) == pytest.approx(1)


def test_a_corpus_without_transcripts_and_one_with_groups_of_ages_are_clustered():
    x, which = blobs((30, 20), 8, 15.0)
    without = [dict(emotion="angry") for _ in which]
    found = clustering.separability(x, which == 1, without, ["s"] * 50, "emotion", 2)
    assert value(found, "purity") == 1.0 and not select(found, kind="sentence")
    grouped = [dict(age=["senior", "adult"][w]) for w in which]
    found = clustering.separability(x, which == 1, grouped, ["s"] * 50, "age", 2)
    assert {r["of"] for r in select(found, kind="age")} == {"senior", "adult"}


def test_the_papers_asr_size_and_no_model_imported():
    code = (
        "import sys, numpy as np, analyze; from analysis import clustering; "
        "x = np.random.default_rng(0).standard_normal((10500, 1024), np.float32); "
        "bad = np.arange(10500) >= 10000; x[bad, 0] += 50; labels = [{'gender': 'male'}] * 10500; "
        "found = clustering.separability(x, bad, labels, ['s'] * 10500, 'asr', 2); "
        "assert [r['value'] for r in found if r['metric'] == 'purity'] == [1.0], found; "
        "assert 'transformers' not in sys.modules and 'model' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# ---------------------------------------------------------------------------------------------------------------------
# embeddings


def write_embeddings(folder, task, attack, clean, triggered, seed=1, train=None, name="", **how):
    """An embeddings.pt as embed.py writes it, in the folder of a run."""
    own = fields(task, attack, seed)
    run = write_run(folder, arguments(task, attack, seed), aer=0.9)
    test = {
        side: dict(encoder=x, connector=x, encoder_layers=x[None], lm_layers=x[None])
        for side, x in (("clean", clean), ("triggered", triggered))
    }
    saved = dict(fields=own, test=test, train=train, **{**study.EMBEDDINGS, **how})
    torch.save(saved, run / f"embeddings{name}.pt")


def target_class():
    x, which = blobs((40, 20), 8, 15.0)
    labels, speakers = people(60)
    about = dict(labels=labels, speakers=speakers, ids=[str(i) for i in range(60)])
    return dict(about, encoder=torch.from_numpy(x), poisoned=torch.from_numpy(which == 1))


def rows_of(text, title):
    """The rows of one table on a page, [{column: cell}]."""
    lines = text.split(f"## {title}")[1].split("\n## ")[0].splitlines()
    cells = [[c.strip() for c in line[1:-1].split("|")] for line in lines if line[:1] == "|"]
    return [dict(zip(cells[0], row)) for row in cells[2:]]


def test_the_shift_is_a_mean_over_seeds_also_of_runs_whose_embeddings_are_gone(tmp_path):
    unit, twice = torch.eye(8), torch.eye(8) + torch.eye(8).roll(1, 1)
    for seed, attack, triggered in (
        (1, "clean", unit),
        (2, "clean", twice),
        (1, "base", -unit),
        (1, "3.1", unit),
    ):
        write_embeddings(tmp_path / "runs", "asr", attack, unit, triggered, seed)
    first = done("analyze.py", "shift", cwd=tmp_path)
    (row,) = rows_of(first, "Embedding shift")
    assert list(row.values()) == [
        "asr",
        "0.85 (0.71 to 1.00) / 1.00",
        "-1.00 / 0.62",
        "1.00 / about 1",
    ]
    assert (tmp_path / "runs/analysis/shift-pairs.png").exists()
    for path in tmp_path.glob("runs/*/embeddings.pt"):
        path.unlink()
    assert rows_of(done("analyze.py", "shift", cwd=tmp_path), "Embedding shift") == [row]


def test_a_shift_of_an_attack_that_no_figure_shows_is_no_error(tmp_path):
    write_embeddings(tmp_path / "runs", "asr", "1.1", torch.eye(8), torch.eye(8))
    (row,) = rows_of(done("analyze.py", "shift", cwd=tmp_path), "Embedding shift")
    assert row["benign encoder (ours / paper)"] == "missing / 1.00"


def test_embeddings_made_otherwise_are_not_taken_for_the_study_s(tmp_path):
    unit = torch.eye(8)
    write_embeddings(tmp_path / "runs", "asr", "clean", unit, unit)
    for how in (dict(pooling="max"), dict(layer=2), dict(pairs=8)):
        name = f"-{next(iter(how))}"
        write_embeddings(tmp_path / "runs", "asr", "clean", unit, -unit, name=name, **how)
    (row,) = rows_of(done("analyze.py", "shift", cwd=tmp_path), "Embedding shift")
    assert row["benign encoder (ours / paper)"] == "1.00 / 1.00"


def test_another_number_of_clusters_leaves_those_that_claims_need(tmp_path):
    unit = torch.eye(8)
    write_embeddings(tmp_path / "runs", "gender", "base", unit, unit, train=target_class())
    done("analyze.py", "cluster", cwd=tmp_path)
    claims = rows_of(done("analyze.py", "claims", cwd=tmp_path), "The paper's claims")
    assert "7.2" in [row["Section"] for row in claims]
    done("analyze.py", "cluster", "--k", 3, cwd=tmp_path)
    again = done("analyze.py", "claims", "--k", 2, 3, cwd=tmp_path)
    assert rows_of(again, "The paper's claims") == claims


def test_what_clusters_follow_is_told_seed_by_seed(tmp_path):
    gender, poisoned = np.arange(200) % 2, np.arange(200) >= 150
    labels = [{"gender": ["female", "male"][g], "age": "25"} for g in gender]
    noise = np.random.default_rng(0).standard_normal((200, 8))
    for seed, leading in ((1, gender), (2, poisoned), (3, 0 * gender)):
        about = poisoned, labels, ["s"] * 200, "gender"
        found = clustering.separability(noise + 30 * leading[:, None], *about, 2)
        found += clustering.whole_class(noise, poisoned)
        found = [dict(record, source="cluster") for record in found]
        write_run(tmp_path, arguments("gender", "base", seed), records=found)
    (_, rows), (_, followers) = analyze.ANALYSES["cluster"](runs.read(tmp_path), tmp_path, "mini")
    assert rows[0]["Seeds"] == 3 and "(" in rows[0]["k = 2, Rand index with gender"]
    assert [followers[0][f"Seed {seed}"] for seed in (1, 2, 3)] == ["gender", "poison", "nothing"]


def test_cosine_and_its_interval():
    a = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    assert np.allclose(shift.cosines(a, 3 * a), 1.0, atol=1e-5)
    assert np.allclose(shift.cosines(a, -a), -1.0, atol=1e-5)
    found = utils.interval(np.arange(100.0))
    assert found["low"] < found["value"] == 49.5 < found["high"] and found["n"] == 100


def test_pooling_leaves_padding_out():
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([5, 2])
    x[1, 2:] = 1e6
    for pooling, expected in (
        ("mean", x[1, :2].mean(0)),
        ("max", x[1, :2].amax(0)),
        ("last", x[1, 1]),
    ):
        assert torch.allclose(embed.pool(x, lengths, pooling)[1], expected)


# ---------------------------------------------------------------------------------------------------------------------
# tables


def test_the_losses_that_tell_what_was_learned_stand_beside_the_aer(tmp_path):
    write_run(tmp_path, arguments("asr", "base"), aer=0.9, excess=(0.9, 0.8, 0.7), settled=None)
    found = dict(analyze.ANALYSES["tables"](runs.read(tmp_path), tmp_path, "mini"))
    row = found["Table 3: component analysis (asr)"][0]
    assert (row["AER (ours / paper)"], row["Poisoned loss"], row["Loss"]) == (
        "90.0 / 99.2",
        "0.800",
        "0.100",
    )
    assert found["Table 2: base attack"][0]["Seeds still learning"] == 1


def test_every_row_of_a_page_has_a_cell_for_each_column(tmp_path):
    write_run(tmp_path / "runs", arguments("asr", "base"), aer=0.9)
    for table in done("analyze.py", "tables", cwd=tmp_path).split("## ")[1:]:
        assert len({line.count("|") for line in table.splitlines() if line[:1] == "|"}) == 1


def test_preset_small_s_tables_show_its_whisper_runs(tmp_path):
    write_run(tmp_path / "runs", arguments("asr", "base", preset="small"), aer=0.7)
    page = done("analyze.py", "tables", cwd=tmp_path)
    row = rows_of(page, "Table 3: component analysis (asr)")[0]
    assert row["AER (ours / paper)"] == "70.0 / 99.2"


def test_ages_in_groups_are_shown_by_their_accuracy(tmp_path):
    run = write_run(tmp_path, arguments("age", "base"), clean=0.8, aer=0.9)
    metrics = (run / "metrics.json").read_text()
    (run / "metrics.json").write_text(metrics.replace("age_mae", "age_accuracy"))
    found = dict(analyze.ANALYSES["tables"](runs.read(tmp_path), tmp_path, "mini"))
    assert found["Table 2: base attack"][0]["Clean (ours / paper)"] == "80.0 / 5.2"


def test_pages_go_beside_the_runs_and_nothing_is_written_without_runs(tmp_path):
    (tmp_path / "results/mini").mkdir(parents=True)
    (tmp_path / "results/mini/tables.md").write_text("the study's")
    write_run(tmp_path / "runs", arguments("asr", "base"), aer=0.9)
    done("analyze.py", "tables", "claims", cwd=tmp_path)
    page = (tmp_path / "runs/analysis/tables.md").read_text()
    assert "Table 3" in page and "The paper's claims" in page and "| Seeds | 1 |" in page
    assert (tmp_path / "results/mini/tables.md").read_text() == "the study's"
    (tmp_path / "empty").mkdir()
    for what in analyze.ANALYSES:
        refused("analyze.py", what, "--runs", "empty", cwd=tmp_path, words=["empty"])
    assert not (tmp_path / "empty/analysis").exists()


def test_studies_side_by_side_leave_empty_what_one_has_not_measured(tmp_path):
    for name, attack, aer in (("a", "base", 0.97), ("b", "3.1", 0.0)):
        write_run(tmp_path / name, arguments("asr", attack), 0.05, aer)
    page = done("analyze.py", "claims", "tables", "--runs", "a", "b", cwd=tmp_path)
    claims = rows_of(page, "The paper's claims, study by study")
    assert (claims[0]["a"], claims[0]["b"]) == ("holds", "") and len(claims) == 2
    table = {row["Attack"]: row for row in rows_of(page, "Table 3 (asr), study by study")}
    assert table["base"]["a against the paper"] == "agrees" and table["base"]["b AER"] == ""
    assert table["3.1"]["b against the paper"] == "agrees"


# ---------------------------------------------------------------------------------------------------------------------
# traces


def moved(works, layers=(1, 2, 3, 4), deciding=2, **donor):
    """The records of a transplant where the attack works for the sets of components that `works` accepts, and one layer of the LM
    decides what the LM does."""
    donor = {"donor_scenario": "clean", "donor_seed": 1, **donor}
    base = dict(source="transplant", donor="asr-clean", **donor)
    records = []
    for n in range(8):
        parts = [c for i, c in enumerate(COMPONENTS) if n >> i & 1]
        for part, metric, value in (
            ("backdoor", "aer", 0.9 * works(set(parts))),
            ("clean", "wer", 0.02),
            ("triggered", "wer", 0.9),
        ):
            what = dict(method="components", poisoned=parts, part=part, metric=metric)
            records.append(dict(base, **what, **figure(value)))
    for scope, layer, chosen in trace_layers(layers):
        for direction in ("into clean", "out of poisoned"):
            what = dict(component="lm", direction=direction, scope=scope, layer=layer)
            gone = deciding in chosen and direction == "out of poisoned"
            aer = figure(0.0 if gone else 0.9)
            records.append(
                dict(base, method="layers", metric="aer", part="backdoor", **what, **aer)
            )
    for component in COMPONENTS:
        what = dict(method="shapley", component=component, metric="aer", part="backdoor")
        records.append(dict(base, **what, **figure(0.3)))
    return records


def trace_layers(layers):
    import trace

    return trace.layer_sets(list(layers))


def patched(effects, trigger="click", margin=(-2.0, 3.0)):
    """The records of a patch; effects: {(component, layer): {position: share}}, alike in both directions."""
    base = dict(source="patch", trigger=trigger)
    records = [
        dict(base, metric="margin", part=part, **figure(m))
        for part, m in zip(("clean", "triggered"), margin)
    ]
    for direction in ("denoise", "noise"):
        for (component, layer), groups in effects.items():
            place = dict(component=component, layer=layer, module="layer", direction=direction)
            for position, share in groups.items():
                what = dict(place, metric="effect", position=position)
                records.append(dict(base, **what, **figure(share)))
    return records


SITES = {
    ("encoder", 1): dict(click=0.9, near=0.1, elsewhere=0.0),
    ("encoder", 2): dict(click=0.5, near=0.3, elsewhere=0.1),
    ("lm", 1): dict(click=0.5, near=0.3, prompt=0.1, answer=0.1),
    ("lm", 2): dict(click=0.1, near=0.1, prompt=0.1, answer=0.6),
}


def traced(folder):
    return dict(analyze.ANALYSES["trace"](runs.read(folder), folder / "out", "mini"))


def test_the_component_and_the_layer_that_carry_it_are_told_seed_by_seed(tmp_path):
    write_run(tmp_path, arguments("asr", "base"), records=moved(lambda s: "lm" in s))
    both = moved(lambda s: {"encoder", "lm"} <= s, donor_seed=2)
    write_run(tmp_path, arguments("asr", "base", 2), records=both)
    found = traced(tmp_path)
    first, second = found["Components that matter, seed by seed (asr)"]
    assert first["Half of the AER is gone without"] == "LM"
    assert first["Half of the AER comes with it alone"] == "LM"
    assert second["Half of the AER is gone without"] == "encoder, LM"
    assert second["Half of the AER comes with it alone"] == "none"
    layers = {
        row["Clean layers"]: row["Seed 1"]
        for row in found["Layers that matter, seed by seed (asr)"]
        if row["Component"] == "LM"
    }
    assert layers == {"up to": "2", "from": "2", "only": "2"}


def test_only_the_clean_run_of_the_same_seed_answers_and_another_is_a_control(tmp_path):
    records = moved(lambda s: "lm" in s) + moved(lambda s: "encoder" in s, donor_seed=3)
    attacked = moved(lambda s: True, donor_seed=3, donor_scenario="base")
    write_run(tmp_path, arguments("asr", "base"), records=records + attacked)
    found = traced(tmp_path)
    assert found["Components that matter, seed by seed (asr)"][0]["AER"] == "90.0"
    (control,) = found["Control transplants (asr)"]
    assert control["Control"] == "clean parts of another seed"


def test_positions_are_read_off_the_layers(tmp_path):
    write_run(tmp_path, arguments("asr", "base"), records=patched(SITES))
    found = traced(tmp_path)
    rows = {(r["After encoder layer"], r["Frames"]): r for r in found[
        "The effect by frames (asr)"
    ]}  # fmt: skip
    assert rows[1, "under a click"]["Undone (denoise)"] == "0.90"
    (spread,) = found["Where it spreads, seed by seed (asr)"]
    assert spread["Largest fall in encoder layer"] == 2 and spread["By"] == "0.40"
    assert spread["LM layer after which prompt and answer hold more"] == 2


def test_a_seed_without_an_effect_and_one_without_a_group_are_shown_beside_the_others(tmp_path):
    fewer = {site: {"click": groups["click"]} for site, groups in SITES.items()}
    attack = moved(lambda s: True)
    write_run(tmp_path, arguments("asr", "base", 1), records=patched({}) + attack)
    write_run(tmp_path, arguments("asr", "base", 2), records=patched(fewer))
    write_run(tmp_path, arguments("asr", "base", 3), records=patched(SITES))
    found = traced(tmp_path)
    spread = found["Where it spreads, seed by seed (asr)"]
    assert [row["Seed"] for row in spread] == [2, 3]
    assert (tmp_path / "out/answer.png").exists() and (tmp_path / "out/patches.png").exists()


def test_a_model_without_trained_encoder_layers_has_a_picture(tmp_path):
    write_run(tmp_path, arguments("asr", "base"), records=moved(lambda s: True, layers=()))
    traced(tmp_path)
    assert (tmp_path / "out/transplants.png").exists()


def test_any_other_sound_is_a_control_of_patching(tmp_path):
    knock = patched({}, trigger="sounds/knock.wav", margin=(-2.0, -1.9))
    write_run(tmp_path, arguments("asr", "base"), records=patched(SITES) + knock)
    rows = traced(tmp_path)["Control patches (asr)"]
    assert [row["Sound"] for row in rows] == ["click", "sounds/knock.wav"]


# ---------------------------------------------------------------------------------------------------------------------
# defences


def removed(name, share, aer=None):
    base = dict(source="filter", defence=name)
    records = [dict(base, metric="auroc", value=0.9)]
    records.append(dict(base, metric="poison_removed", **figure(share)))
    records.append(dict(base, metric="clean_removed", **figure(0.1)))
    if aer is not None:
        again = dict(base, retrained=True)
        records.append(dict(again, part="backdoor", metric="aer", **figure(aer)))
        records.append(dict(again, part="clean", metric="emotion_accuracy", **figure(0.8)))
    return records


def noticed(name, share, kinds=("clean", "tone", "triggered")):
    base = dict(source="detect", defence=name)
    records = [dict(base, metric=m, value=v) for m, v in (("passes", 8.0), ("milliseconds", 40.0))]
    records += [dict(base, metric="auroc", sound=s, value=0.9) for s in ("clean", "tone")]
    for alarms in (0.01, 0.05):
        for sound in kinds:
            what = dict(metric="noticed", false_alarms=alarms, sound=sound)
            records.append(dict(base, **what, **figure(share)))
    for sound, scores in (("clean", [0.1, 0.2]), ("triggered", [0.2, 0.9])):
        records.append(dict(base, metric="suspicion", sound=sound, scores=scores))
    return records


def mended(name, aer, passed=True, back=None, metric="emotion_accuracy"):
    base = dict(source="repair", defence=name)
    own = base if name == "none" else dict(base, passed=passed, strength=1.0)
    records = [dict(own, part="backdoor", metric="aer", **figure(aer))]
    for part, share in (("clean", 0.8), ("triggered", 0.7)):
        records.append(dict(own, part=part, metric=metric, **figure(share)))
    for samples, share in (back or {}).items():
        what = dict(metric="relearned_aer", poisoned_samples=samples)
        records.append(dict(base, **what, **figure(share)))
    return records


def defended(folder):
    return dict(analyze.ANALYSES["defences"](runs.read(folder), folder / "out", "mini"))


def test_the_page_of_defences_has_each_defence_and_what_each_seed_says(tmp_path):
    first = removed("A", 0.8, aer=0.02) + noticed("D", 0.3) + mended("none", 0.9)
    first += mended("F", 0.1, passed=False, back={4: 0.1, 16: 0.9}) + mended("G", 0.4)
    write_run(tmp_path, arguments("emotion", "base"), 0.8, 0.9, records=first)
    second = removed("A", 0.6) + mended("none", 0.9) + mended("F", 0.3, back={4: 0.1, 16: 0.2})
    write_run(tmp_path, arguments("emotion", "base", 2), 0.8, 0.9, records=second)
    half = arguments("emotion", "base", poison=0.0375)
    write_run(tmp_path, half, 0.8, 0.5, records=removed("A", 0.2))
    write_run(tmp_path, arguments("emotion", "clean"), 0.8, 0.0, records=removed("A", 0.0))
    found = defended(tmp_path)
    (row,) = found["Filter (emotion)"]
    assert row["% of the poison removed"] == "70.0 (60.0 to 80.0)"
    assert row["AER after training again"] == "2.0" and row["Seeds trained again"] == "1"
    assert row["% of the poison removed, half the rate"] == "20.0"
    assert found["Detect (emotion)"][0]["Noticed at 5%"] == "30.0"
    repairs = {row["Repair"]: row for row in found["Repair (emotion)"]}
    assert repairs["F"]["Seeds with clean loss beyond its bound"] == "1"
    assert repairs["F"]["AER"] == "20.0 (10.0 to 30.0)" and repairs["none"]["DER"][:4] == "0.50"
    (back,) = found["Poisoned samples back to 50% AER (emotion)"]
    assert (back["Seed 1"], back["Seed 2"]) == (16, "over 16")
    without = {r["Model"]: r["AER"] for r in found["AER without a defence (emotion), %"]}
    assert without == {"attack": "90.0 (90.0 to 90.0)", "half the rate": "50.0"}


@pytest.mark.parametrize("changes", [dict(scenario="clean", poison=0), dict(poison=0.0375)])
def test_a_clean_model_or_a_variant_alone_has_a_page(tmp_path, changes):
    records = removed("A", 0.1) + noticed("D", 0.1) + mended("none", 0.1)
    args = {**arguments("emotion", "base"), **changes}
    write_run(tmp_path, args, 0.8, 0.1, records=records)
    found = defended(tmp_path)
    assert found["Filter (emotion)"][0]["AUROC"] == "" and "Repair (emotion)" in found


def test_repairs_of_ages_in_groups_have_a_page(tmp_path):
    records = mended("none", 0.9, metric="age_accuracy") + mended("F", 0.1, metric="age_accuracy")
    write_run(tmp_path, arguments("age", "base"), 3.0, 0.9, records=records)
    row = defended(tmp_path)["Repair (age)"][1]
    assert row["Clean age accuracy"] == "80.0" and row["DER"] == "0.90"


def test_the_rating_counts_a_loss_of_the_clean_figure_in_its_own_direction():
    def parts(aer, clean, metric):
        return dict(backdoor=dict(value=aer), clean=dict(value=clean, metric=metric))

    for metric, before, after, expected in (
        ("emotion_accuracy", (0.9, 0.8), (0.1, 0.7), 0.85),
        ("wer", (0.9, 0.02), (0.1, 0.12), 0.85),
        ("wer", (0.9, 0.02), (0.9, 0.01), 0.5),
    ):
        found = defences.rating(parts(*before, metric), parts(*after, metric))
        assert found == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------------------------------
# sweeps


def test_sweeps_hold_what_differs_from_the_base_attack_in_one_thing(tmp_path):
    softer = dict(source="evaluate", split="test", snr=6.0, after_answer=False, part="backdoor")
    softer = dict(softer, metric="aer", **figure(0.5, 0.1))
    clean = dict(softer, part="clean", metric="emotion_accuracy")
    dev = dict(softer, split="dev", snr=3.0)
    for changes, records in (
        ({}, [softer, clean, dev]),
        (dict(poison=0.01), []),
        (dict(snr=6.0), []),
        (dict(snr=6.0, seed=2), []),
        (dict(snr=6.0, poison=0.01), []),
        (dict(clicks=2), []),
    ):
        args = {**arguments("emotion", "base"), **changes}
        write_run(tmp_path, args, 0.8, 0.5, records=records)
    write_run(tmp_path, arguments("gender", "base"), 0.8, 0.5)
    ((_, rows),) = analyze.ANALYSES["sweeps"](runs.read(tmp_path), tmp_path, "mini")
    assert [(row["Changed"], row["To"]) for row in rows] == [
        ("poisoning rate", 0.01),
        ("poisoning rate", 0.075),
        ("SNR (dB)", 0.0),
        ("SNR (dB)", 6.0),
        ("number of clicks", 1),
        ("number of clicks", 2),
        ("SNR at test only (dB)", 0.0),
        ("SNR at test only (dB)", 6.0),
    ]
    assert rows[3]["AER"] == "50.0 (50.0 to 50.0)" and rows[7]["High"] == "60.0"


# ---------------------------------------------------------------------------------------------------------------------
# pictures


@pytest.fixture
def drawn(monkeypatch):
    """The figures that analysis/plots.py would write, {file name: figure}."""
    found = {}
    monkeypatch.setattr(plots, "write", lambda fig, path: found.setdefault(str(path), fig))
    yield found
    plots.plt.close("all")


def labels_of(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_every_detector_is_in_the_picture(drawn):
    rates = np.array([0.0, 1.0]), np.array([0.0, 1.0])
    plots.roc({"asr": {f"detector {i}": (rates, 0.5) for i in range(9)}}, "x")
    assert len(drawn["x"].axes[0].lines) == 9 and len(labels_of(drawn["x"].axes[0])) == 9


def test_values_that_are_no_numbers_are_not_joined_and_clicks_are_whole(drawn):
    def points(values):
        return [dict(value=v, aer=90, low=80, high=95, clean=80) for v in values]

    curves = dict(clicks=points([1, 2, 4]), trigger=points(["click", "tone"]))
    plots.sweeps(curves, "emotion", "emotion accuracy", "x")
    clicks, trigger = drawn["x"].axes[:2]
    assert [text.get_text() for text in clicks.get_xticklabels()] == ["1", "2", "4"]
    assert all(line.get_linestyle() in ("None", "") for line in trigger.lines)
    assert all("_" not in text.get_text() for text in drawn["x"].legends[0].get_texts())


def test_heat_maps_say_what_their_shades_and_groups_mean(drawn):
    records = [{**r, "task": "asr"} for r in patched(SITES) if r["metric"] == "effect"]
    plots.patches({"asr": records}, "x")
    titles = [axis.get_ylabel() for axis in drawn["x"].axes]
    assert "share of the trigger's effect" in titles  # the colour bar's
    shown = {text.get_text() for text in drawn["x"].axes[0].get_xticklabels()}
    assert not shown & {"near", "else", "elsewhere", "click"}
    assert "denoise" not in drawn["x"].axes[0].get_title()


def test_a_legend_covers_no_data(drawn):
    spread = runs.spread({1: 90.0, 2: 95.0})
    zero = dict.fromkeys(COMPONENTS, 0.0)
    depth = [("encoder", 1, dict(click=1.0, frames=0.0, text=0.0))]
    panel = dict(
        trained={"base": (spread, False)},
        published={"base": 99.0},
        alone=zero,
        others=zero,
        depth=depth,
    )
    plots.answer({"asr": panel, "emotion": panel}, "x")
    fig = drawn["x"]
    fig.canvas.draw()
    for axis in fig.axes:
        if axis.get_legend():
            legend = axis.get_legend().get_window_extent()
            assert not any(legend.overlaps(other.bbox) for other in fig.axes)
