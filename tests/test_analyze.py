"""analyze.py and analysis/ on made-up records and tensors whose answer is known."""

import json
import subprocess
import sys

import utils

import numpy as np
import pytest
import torch

import analyze
import model
import runs
import study
import trace as tracing
from analysis import cluster, clustering, defences, learning, plots, shift, sweeps, tables, trace
from conftest import ROOT, arguments, done, fields, figure, refused, write_run
from runs import select
from study import COMPONENTS

# --------------------------------------------------------------------------------------------------
# clusters


def blobs(sizes, dim, apart, seed=0):
    """Gaussian blobs with centres `apart` from each other: (n, dim), which blob (n,)."""
    rng = np.random.default_rng(seed)
    centres = np.linalg.qr(rng.standard_normal((dim, len(sizes))))[0].T * apart
    which = np.repeat(np.arange(len(sizes)), sizes)
    return (centres[which] + rng.standard_normal((len(which), dim))).astype(np.float32), which


def people(n):
    """Labels of n samples and their speakers."""
    labels = []
    for i in range(n):
        gender = "male" if i % 2 else "female"
        age = str(20 + i % 10)
        labels.append({"gender": gender, "age": age, "transcript": "don't forget a jacket"})
    return labels, [str(i % 7) for i in range(n)]


def genders(male):
    """Labels of samples, from whether each is of a man, (n,)."""
    return [{"gender": "male" if is_male else "female", "age": "25"} for is_male in male]


def value(records, metric, **wanted):
    (record,) = select(records, metric=metric, **wanted)
    return record["value"]


def test_a_poison_apart_is_a_cluster():
    x, which = blobs((300, 40), 32, 20.0)
    records = clustering.separability(x, which == 1, *people(340), "emotion", 2)
    assert value(records, "purity") == 1.0
    assert value(records, "recall") == 1.0
    assert value(records, "adjusted_rand", kind="poison") == 1.0
    assert abs(value(records, "adjusted_rand", kind="gender")) < 0.05


def test_a_linear_probe_finds_a_poison_apart():
    x, which = blobs((300, 40), 32, 20.0)
    assert value(clustering.whole_class(x, which == 1), "probe") > 0.99


def test_four_clusters_show_what_gender_hides_from_two():
    rng = np.random.default_rng(1)
    gender = np.arange(400) % 2
    poisoned = np.arange(400) >= 340
    x = rng.standard_normal((400, 32)).astype(np.float32)
    x[:, 0] += 40 * gender
    x[:, 1] += 15 * poisoned
    about = poisoned, genders(gender), ["s"] * 400, "age"
    two = clustering.separability(x, *about, 2)
    four = clustering.separability(x, *about, 4)
    assert value(two, "adjusted_rand", kind="gender") == 1.0
    assert value(two, "purity") < 0.2
    assert {record["value"] for record in select(two, of="female")} == {0.0, 1.0}
    assert value(four, "purity") == 1.0


def test_nothing_is_found_where_there_is_no_structure():
    x, _ = blobs((400,), 32, 0.0)
    poisoned = np.random.default_rng(2).random(400) < 0.1
    records = clustering.whole_class(x, poisoned)
    assert value(records, "silhouette") < 0.10
    assert abs(value(records, "probe") - 0.5) < 0.15


def test_shares_of_a_cluster_sum_to_one():
    x, which = blobs((50, 30, 20), 16, 15.0)
    records = clustering.composition(which, which == 2, people(100)[0], "age")
    assert [r["value"] for r in select(records, metric="cluster_size")] == [50, 30, 20]
    assert [r["value"] for r in select(records, of="poisoned")] == [0.0, 0.0, 1.0]
    for kind in ("gender", "age"):
        for index in range(3):
            shares = [r["value"] for r in select(records, cluster=index, kind=kind)]
            assert sum(shares) == pytest.approx(1)


def test_a_corpus_without_transcripts_is_clustered():
    x, which = blobs((30, 20), 8, 15.0)
    labels = [dict(emotion="angry") for _ in which]
    records = clustering.separability(x, which == 1, labels, ["s"] * 50, "emotion", 2)
    assert value(records, "purity") == 1.0
    assert select(records, kind="sentence") == []


def test_groups_of_ages_are_clustered():
    x, which = blobs((30, 20), 8, 15.0)
    labels = [dict(age="adult" if w else "senior") for w in which]
    records = clustering.separability(x, which == 1, labels, ["s"] * 50, "age", 2)
    assert {r["of"] for r in select(records, kind="age")} == {"senior", "adult"}


def test_the_papers_asr_target_class_is_clustered():
    x = np.random.default_rng(0).standard_normal((10500, 1024), np.float32)
    poisoned = np.arange(10500) >= 10000
    x[poisoned, 0] += 50
    labels = [{"gender": "male"}] * 10500
    records = clustering.separability(x, poisoned, labels, ["s"] * 10500, "asr", 2)
    assert value(records, "purity") == 1.0


@pytest.mark.slow
def test_analyze_imports_no_model():
    code = "import sys, analyze; assert not {'transformers', 'model'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# --------------------------------------------------------------------------------------------------
# embeddings


def write_embeddings(folder, task, scenario, clean, triggered, seed=1, train=None, name="", **how):
    """An embeddings.pt as embed.py writes it, in the folder of a run."""
    run = write_run(folder, arguments(task, scenario, seed), aer=0.9)
    test = {}
    for side, x in (("clean", clean), ("triggered", triggered)):
        test[side] = dict(encoder=x, connector=x, encoder_layers=x[None], lm_layers=x[None])
    saved = dict(fields=fields(task, scenario, seed), test=test, train=train)
    torch.save({**saved, **study.EMBEDDINGS, **how}, run / f"embeddings{name}.pt")


def target_class():
    x, which = blobs((40, 20), 8, 15.0)
    labels, speakers = people(60)
    about = dict(labels=labels, speakers=speakers, ids=[str(i) for i in range(60)])
    return dict(about, encoder=torch.from_numpy(x), poisoned=torch.from_numpy(which == 1))


def cells_of(line):
    return [cell.strip() for cell in line[1:-1].split("|")]


def rows_of(text, title):
    """The rows of one table on a page, [{column: cell}]."""
    table = text.split(f"## {title}")[1].split("\n## ")[0]
    columns, _, *rows = [cells_of(line) for line in table.splitlines() if line.startswith("|")]
    return [dict(zip(columns, row)) for row in rows]


def shift_row(folder):
    """The one row of python analyze.py shift."""
    (row,) = rows_of(done("analyze.py", "shift", cwd=folder), "Embedding shift")
    return row


def test_the_shift_is_a_mean_over_seeds(tmp_path):
    unit = torch.eye(8)
    half_moved = unit + unit.roll(1, 1)
    runs_folder = tmp_path / "runs"
    write_embeddings(runs_folder, "asr", "clean", unit, unit, seed=1)
    write_embeddings(runs_folder, "asr", "clean", unit, half_moved, seed=2)
    write_embeddings(runs_folder, "asr", "base", unit, -unit)
    write_embeddings(runs_folder, "asr", "3.1", unit, unit)
    row = shift_row(tmp_path)
    assert row["benign encoder (ours / paper)"] == "0.85 (-1.00 to 1.00) / 1.00"
    assert row["poisoned encoder (ours / paper)"] == "-1.00 / 0.62"
    assert row["connector after clean data (ours / paper)"] == "1.00 / about 1"
    assert (tmp_path / "runs/analysis/shift-pairs.png").exists()


def test_the_shift_outlives_the_embeddings(tmp_path):
    write_embeddings(tmp_path / "runs", "asr", "clean", torch.eye(8), torch.eye(8))
    row = shift_row(tmp_path)
    for path in tmp_path.glob("runs/*/embeddings.pt"):
        path.unlink()
    assert shift_row(tmp_path) == row


def test_a_scenario_that_no_figure_shows_is_no_error(tmp_path):
    write_embeddings(tmp_path / "runs", "asr", "1.1", torch.eye(8), torch.eye(8))
    assert shift_row(tmp_path)["benign encoder (ours / paper)"] == "missing / 1.00"


def test_embeddings_made_otherwise_are_left_out(tmp_path):
    unit = torch.eye(8)
    write_embeddings(tmp_path / "runs", "asr", "clean", unit, unit)
    for how in (dict(pooling="max"), dict(layer=2), dict(pairs=8)):
        name = f"-{next(iter(how))}"
        write_embeddings(tmp_path / "runs", "asr", "clean", unit, -unit, name=name, **how)
    assert shift_row(tmp_path)["benign encoder (ours / paper)"] == "1.00 / 1.00"


def test_another_k_leaves_the_clusters_of_the_claims(tmp_path):
    unit = torch.eye(8)
    write_embeddings(tmp_path / "runs", "gender", "base", unit, unit, train=target_class())
    done("analyze.py", "cluster", cwd=tmp_path)
    claims = rows_of(done("analyze.py", "claims", cwd=tmp_path), "The paper's claims")
    assert "7.2" in [row["Section"] for row in claims]
    done("analyze.py", "cluster", "--k", 3, cwd=tmp_path)
    again = done("analyze.py", "claims", cwd=tmp_path)
    assert rows_of(again, "The paper's claims") == claims


def test_what_clusters_follow_is_told_seed_by_seed(tmp_path):
    gender = np.arange(200) % 2
    poisoned = np.arange(200) >= 150
    noise = np.random.default_rng(0).standard_normal((200, 8))
    for seed, leading in ((1, gender), (2, poisoned), (3, 0 * gender)):
        x = noise + 30 * leading[:, None]
        records = clustering.separability(x, poisoned, genders(gender), ["s"] * 200, "gender", 2)
        records += clustering.whole_class(noise, poisoned)
        records = [dict(record, source="cluster") for record in records]
        write_run(tmp_path, arguments("gender", "base", seed), records=records)
    (_, (row,)), (_, followers) = cluster.page(runs.read(tmp_path), tmp_path, "mini")
    assert row["Seeds"] == 3
    assert "(" in row["k = 2, Rand index with gender"]
    by_seed = [followers[0][f"Seed {seed}"] for seed in (1, 2, 3)]
    assert by_seed == ["gender", "poison", "nothing"]


def test_cosine():
    a = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    assert np.allclose(shift.cosines(a, 3 * a), 1.0, atol=1e-5)
    assert np.allclose(shift.cosines(a, -a), -1.0, atol=1e-5)


def test_the_bootstrap_interval_lies_around_the_mean():
    figure = utils.interval(np.arange(100.0))
    assert figure["low"] < figure["value"] == 49.5 < figure["high"]
    assert figure["n"] == 100


@pytest.mark.parametrize("pooling", ["mean", "max", "last"])
def test_pooling_leaves_padding_out(pooling):
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([5, 2])
    x[1, 2:] = 1e6
    spoken = x[1, :2]
    expected = dict(mean=spoken.mean(0), max=spoken.amax(0), last=spoken[1])
    assert torch.allclose(model.pool(x, lengths, pooling)[1], expected[pooling])


# --------------------------------------------------------------------------------------------------
# tables


def tables_of(folder):
    """{title: rows} of python analyze.py tables"""
    return dict(tables.page(runs.read(folder), folder, "mini"))


def test_the_losses_stand_beside_the_aer(tmp_path):
    losses = (1.0, 0.9, 0.8)
    args = arguments("asr", "base")
    write_run(tmp_path, args, aer=0.9, poisoned_losses=losses, settled=None)
    pages = tables_of(tmp_path)
    row = pages["Table 3: component analysis (ASR)"][0]
    assert row["AER (ours / paper)"] == "90.0 (89.0 to 91.0) / 99.2"
    assert row["Poisoned loss"] == "0.800"
    assert row["Loss"] == "0.100"
    assert pages["Table 2: base attack"][0]["Seeds still learning"] == 1


def test_what_the_trigger_does_stands_beside_the_aer(tmp_path):
    run = write_run(tmp_path, arguments("asr", "base"), aer=0.2)
    write_run(tmp_path, arguments("asr", "1.1"), aer=0.2)
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["backdoor"]["changed"] = figure(0.7)
    metrics["answers"] = dict(triggered=dict(n=8, empty=1, malformed=3))
    metrics["training"]["target_loss"] = dict(value=0.5, by_epoch=[0.5])
    (run / "metrics.json").write_text(json.dumps(metrics))
    base, earlier = tables_of(tmp_path)["Table 3: component analysis (ASR)"][:2]
    assert base["Changed answers"] == "70.0 (69.0 to 71.0)"
    assert base["Unusable answers"] == "50.0"
    assert base["Target loss"] == "0.500"
    assert "Poisoned loss" not in base
    assert earlier["Changed answers"] == "missing"


def test_learned_or_memorised_shows_every_run_that_was_followed(tmp_path):
    run = write_run(tmp_path, arguments("emotion", "base", epochs=2), aer=0.2)
    write_run(tmp_path, arguments("emotion", "1.1"))
    metrics = json.loads((run / "metrics.json").read_text())
    by_epoch = dict(target_loss=[1.0, 0.1], dev_target_loss=[1.0, 2.0], dev_aer=[0.5, 0.25])
    for metric, values in by_epoch.items():
        metrics["training"][metric] = dict(value=values[-1], by_epoch=values)
    (run / "metrics.json").write_text(json.dumps(metrics))
    [(_, [row])] = learning.page(runs.read(tmp_path), tmp_path, "mini")
    assert row["Target loss, poisoned training samples"] == "0.100"
    assert row["Target first on dev, %, last epoch"] == "25.0"
    assert row["Best epoch"] == "50.0 (1)"
    assert (tmp_path / "learning.png").exists()


def test_what_no_run_measured_has_no_column(tmp_path):
    write_run(tmp_path, arguments("asr", "base"))
    row = tables_of(tmp_path)["Table 3: component analysis (ASR)"][0]
    assert not {"Changed answers", "Unusable answers", "Target loss"} & set(row)


def test_every_row_of_a_page_has_a_cell_for_each_column(tmp_path):
    write_run(tmp_path / "runs", arguments("asr", "base"), aer=0.9)
    for table in done("analyze.py", "tables", cwd=tmp_path).split("## ")[1:]:
        assert len({line.count("|") for line in table.splitlines() if line[:1] == "|"}) == 1


def test_tables_of_preset_small_show_its_whisper_runs(tmp_path):
    write_run(tmp_path / "runs", arguments("asr", "base", preset="small"), aer=0.7)
    page = done("analyze.py", "tables", cwd=tmp_path)
    row = rows_of(page, "Table 3: component analysis (ASR)")[0]
    assert row["AER (ours / paper)"] == "70.0 (69.0 to 71.0) / 99.2"


def test_ages_in_groups_are_shown_by_their_accuracy(tmp_path):
    run = write_run(tmp_path, arguments("age", "base"), clean=0.8, aer=0.9)
    metrics = (run / "metrics.json").read_text()
    (run / "metrics.json").write_text(metrics.replace("age_mae", "age_accuracy"))
    assert tables_of(tmp_path)["Table 2: base attack"][0]["Triggered"] == "80.0 (79.0 to 81.0)"


def test_a_page_goes_beside_the_runs(tmp_path):
    write_run(tmp_path / "runs", arguments("asr", "base"), aer=0.9)
    done("analyze.py", "tables", "claims", cwd=tmp_path)
    page = (tmp_path / "runs/analysis/tables.md").read_text()
    assert "Table 3" in page
    assert "The paper's claims" in page
    assert "| Seeds | 1 |" in page


@pytest.mark.parametrize("name", analyze.ANALYSES)
def test_nothing_is_written_without_runs(tmp_path, name):
    (tmp_path / "empty").mkdir()
    refused("analyze.py", name, "--runs", "empty", cwd=tmp_path, words=["empty"])
    assert not (tmp_path / "empty/analysis").exists()


def test_a_study_s_column_is_empty_where_it_measured_nothing(tmp_path):
    write_run(tmp_path / "a", arguments("asr", "base"), 0.05, 0.97)
    write_run(tmp_path / "b", arguments("asr", "3.1"), 0.05, 0.0)
    page = done("analyze.py", "claims", "tables", "--runs", "a", "b", cwd=tmp_path)
    claims = rows_of(page, "The paper's claims, study by study")
    assert len(claims) == 2
    assert (claims[0]["a"], claims[0]["b"]) == ("holds", "")
    table = {row["Attack"]: row for row in rows_of(page, "Table 3 (ASR), study by study")}
    assert table["base"]["a against the paper"] == "agrees"
    assert table["base"]["b AER"] == ""
    assert table["3.1"]["b against the paper"] == "agrees"


# --------------------------------------------------------------------------------------------------
# traces


def moved(works, layers=(1, 2, 3, 4), deciding=2, **donor):
    """The records of a transplant. works: whether the attack works, from the set of components that
    are poisoned. deciding: the layer without which the LM has no backdoor."""
    donor = {"donor_scenario": "clean", "donor_seed": 1, **donor}
    base = dict(source="transplant", donor="asr-clean", **donor)
    records = mixtures(base, works) + moved_layers(base, layers, deciding)
    for component in COMPONENTS:
        what = dict(method="shapley", component=component, metric="aer", part="backdoor")
        records.append(dict(base, **what, **figure(0.3)))
    return records


def mixtures(base, works):
    records = []
    for n in range(8):
        parts = [component for i, component in enumerate(COMPONENTS) if n >> i & 1]
        mixture = dict(base, method="components", poisoned=parts)
        aer = figure(0.9 * works(set(parts)))
        records.append(dict(mixture, part="backdoor", metric="aer", **aer))
        records.append(dict(mixture, part="clean", metric="wer", **figure(0.02)))
        records.append(dict(mixture, part="triggered", metric="wer", **figure(0.9)))
    return records


def moved_layers(base, layers, deciding):
    records = []
    base = dict(base, method="layers", component="lm", metric="aer", part="backdoor")
    for scope, layer, chosen in tracing.layer_sets(list(layers)):
        for direction in ("into clean", "out of poisoned"):
            gone = deciding in chosen and direction == "out of poisoned"
            what = dict(direction=direction, scope=scope, layer=layer)
            records.append(dict(base, **what, **figure(0.0 if gone else 0.9)))
    return records


def patched(effects, trigger="click", margin=(-2.0, 3.0), flipped=0.25):
    """The records of a patch; effects: {(component, layer): {position: share}}, alike in both
    directions; margin: of clean and triggered speech; flipped: the share of answers."""
    base = dict(source="patch", trigger=trigger)
    clean, triggered = margin
    records = [dict(base, metric="margin", part="clean", **figure(clean))]
    records.append(dict(base, metric="margin", part="triggered", **figure(triggered)))
    for direction in ("denoise", "noise"):
        for (component, layer), groups in effects.items():
            place = dict(component=component, layer=layer, module="layer", direction=direction)
            for position, share in groups.items():
                what = dict(place, metric="effect", position=position, flipped=flipped)
                records.append(dict(base, **what, **figure(share)))
            if "random" in groups:
                what = dict(place, metric="effect_over_random", position="click")
                difference = groups["click"] - groups["random"]
                records.append(dict(base, **what, **figure(difference)))
    return records


SITES = {
    ("encoder", 1): dict(click=0.9, near=0.1, elsewhere=0.0, random=0.0),
    ("encoder", 2): dict(click=0.5, near=0.3, elsewhere=0.1, random=0.1),
    ("lm", 1): dict(click=0.5, near=0.3, prompt=0.1, answer=0.1),
    ("lm", 2): dict(click=0.1, near=0.1, prompt=0.1, answer=0.6),
}


def carried_by(*components):
    """For `moved`: the attack works where these components are poisoned."""
    return lambda poisoned: set(components) <= poisoned


def traced(folder):
    """{title: rows} of python analyze.py trace"""
    return dict(trace.page(runs.read(folder), folder / "out", "mini"))


def test_the_component_that_carries_it_is_told_by_seed(tmp_path):
    write_run(tmp_path, arguments("asr", "base"), records=moved(carried_by("lm")))
    both = moved(carried_by("encoder", "lm"), donor_seed=2)
    write_run(tmp_path, arguments("asr", "base", 2), records=both)
    first, second = traced(tmp_path)["Components that matter, seed by seed (ASR)"]
    assert first["Half of the AER is gone without"] == "LM"
    assert first["Half of the AER comes with it alone"] == "LM"
    assert second["Half of the AER is gone without"] == "encoder, LM"
    assert second["Half of the AER comes with it alone"] == "none"


def test_the_layer_that_carries_it_is_told_by_seed(tmp_path):
    write_run(tmp_path, arguments("asr", "base"), records=moved(carried_by("lm")))
    rows = traced(tmp_path)["Layers that matter, seed by seed (ASR)"]
    layers = {row["Clean layers"]: row["Seed 1"] for row in select(rows, Component="LM")}
    assert layers == {"up to": "2", "from": "2", "only": "2"}


def test_a_clean_run_of_another_seed_is_a_control(tmp_path):
    records = moved(carried_by("lm")) + moved(carried_by("encoder"), donor_seed=3)
    records += moved(carried_by(), donor_seed=3, donor_scenario="base")
    write_run(tmp_path, arguments("asr", "base"), records=records)
    pages = traced(tmp_path)
    assert pages["Components that matter, seed by seed (ASR)"][0]["AER"] == "90.0"
    (control,) = pages["Control transplants (ASR)"]
    assert control["Control"] == "clean parts of another seed"


def test_positions_are_read_off_the_layers(tmp_path):
    write_run(tmp_path, arguments("asr", "base"), records=patched(SITES))
    pages = traced(tmp_path)
    frames = {"After encoder layer": 1, "Frames": "under a click"}
    (row,) = select(pages["The effect by frames (ASR)"], **frames)
    assert row["Undone (denoise)"] == "0.90 (0.89 to 0.91)"
    (spread,) = pages["Where it spreads, seed by seed (ASR)"]
    assert spread["Largest fall in encoder layer"] == 2
    assert spread["By"] == "0.40"
    assert spread["LM layer after which prompt and answer hold more"] == 2


def test_frames_under_a_click_stand_beside_random_ones(tmp_path):
    write_run(tmp_path, arguments("asr", "base"), records=patched(SITES))
    rows = select(traced(tmp_path)["The effect by frames (ASR)"], **{"After encoder layer": 2})
    undone = {row["Frames"]: row["Undone (denoise)"] for row in rows}
    assert undone["as many others, at random"] == "0.10 (0.09 to 0.11)"
    assert undone["under a click, minus as many others, at random"] == "0.40 (0.39 to 0.41)"


def test_the_share_of_flipped_answers_is_over_seeds(tmp_path):
    for seed, share in ((1, 0.2), (2, 0.4)):
        records = patched(SITES, flipped=share)
        write_run(tmp_path, arguments("asr", "base", seed), records=records)
    rows = traced(tmp_path)["The effect by frames (ASR)"]
    assert rows[0]["Answers flipped (denoise), %"].startswith("30.0 (")


def test_another_sound_s_effects_stand_below_the_trigger_s(tmp_path):
    noise = patched({("encoder", 1): dict(click=0.7)}, trigger="white-noise")
    write_run(tmp_path, arguments("asr", "base"), records=noise + patched(SITES))
    rows = traced(tmp_path)["The effect by frames (ASR)"]
    assert list(dict.fromkeys(row["Sound"] for row in rows)) == ["click", "white-noise"]
    assert rows[-1]["Undone (denoise)"] == "0.70 (0.69 to 0.71)"


def test_a_seed_without_an_effect_is_left_out(tmp_path):
    records = patched({}) + moved(carried_by())
    write_run(tmp_path, arguments("asr", "base", 1), records=records)
    write_run(tmp_path, arguments("asr", "base", 2), records=patched(SITES))
    (row,) = traced(tmp_path)["Where it spreads, seed by seed (ASR)"]
    assert row["Seed"] == 2
    assert (tmp_path / "out/answer.png").exists()


def test_a_group_of_positions_may_be_missing_in_a_seed(tmp_path):
    fewer = {site: {"click": groups["click"]} for site, groups in SITES.items()}
    write_run(tmp_path, arguments("asr", "base", 1), records=patched(fewer))
    write_run(tmp_path, arguments("asr", "base", 2), records=patched(SITES))
    rows = traced(tmp_path)["Where it spreads, seed by seed (ASR)"]
    assert [row["Seed"] for row in rows] == [1, 2]
    assert (tmp_path / "out/patches.png").exists()


def test_a_model_without_trained_layers_has_a_picture(tmp_path):
    write_run(tmp_path, arguments("asr", "base"), records=moved(carried_by(), layers=()))
    traced(tmp_path)
    assert (tmp_path / "out/transplants.png").exists()


def test_any_other_sound_is_a_control_of_patching(tmp_path):
    knock = patched({}, trigger="sounds/knock.wav", margin=(-2.0, -1.9))
    write_run(tmp_path, arguments("asr", "base"), records=patched(SITES) + knock)
    rows = traced(tmp_path)["Control patches (ASR)"]
    assert [row["Sound"] for row in rows] == ["click", "sounds/knock.wav"]


# --------------------------------------------------------------------------------------------------
# defences


def filtered(name, share, aer=None):
    """The records of a filter; aer: of the model that was trained on the rest."""
    base = dict(source="filter", defence=name)
    records = [dict(base, metric="auroc", value=0.9)]
    records.append(dict(base, metric="poison_removed", **figure(share)))
    records.append(dict(base, metric="clean_removed", **figure(0.1)))
    if aer is not None:
        retrained = dict(base, retrained=True)
        records.append(dict(retrained, part="backdoor", metric="aer", **figure(aer)))
        records.append(dict(retrained, part="clean", metric="emotion_accuracy", **figure(0.8)))
    return records


def detected(name, share):
    """The records of a detector."""
    base = dict(source="detect", defence=name)
    records = [dict(base, metric="passes", value=8.0), dict(base, metric="milliseconds", value=40)]
    for sound in ("clean", "tone"):
        records.append(dict(base, metric="auroc", sound=sound, value=0.9))
    for alarms in (0.01, 0.05):
        for sound in ("clean", "tone", "triggered"):
            what = dict(metric="noticed", false_alarms=alarms, sound=sound)
            records.append(dict(base, **what, **figure(share)))
    records.append(dict(base, metric="suspicion", sound="clean", scores=[0.1, 0.2]))
    records.append(dict(base, metric="suspicion", sound="triggered", scores=[0.2, 0.9]))
    return records


def repaired(name, aer, passed=True, relearned=None, metric="emotion_accuracy"):
    """The records of a repair; relearned: {poisoned samples: the AER that they bring back}."""
    base = dict(source="repair", defence=name)
    figures = base if name == "none" else dict(base, passed=passed, strength=1.0)
    records = [dict(figures, part="backdoor", metric="aer", **figure(aer))]
    records.append(dict(figures, part="clean", metric=metric, **figure(0.8)))
    records.append(dict(figures, part="triggered", metric=metric, **figure(0.7)))
    for samples, share in (relearned or {}).items():
        what = dict(metric="relearned_aer", poisoned_samples=samples)
        records.append(dict(base, **what, **figure(share)))
    return records


def defended(folder):
    """{title: rows} of python analyze.py defences"""
    return dict(defences.page(runs.read(folder), folder / "out", "mini"))


@pytest.fixture(scope="module")
def defence_pages(tmp_path_factory):
    """The page of two seeds of a base attack, a variant at half the rate and a clean model."""
    folder = tmp_path_factory.mktemp("defences")
    first = filtered("A", 0.8, aer=0.02) + detected("D", 0.3)
    first += repaired("none", 0.9) + repaired("G", 0.4)
    first += repaired("F", 0.1, passed=False, relearned={4: 0.1, 16: 0.9})
    second = filtered("A", 0.6) + repaired("none", 0.9)
    second += repaired("F", 0.3, relearned={4: 0.1, 16: 0.2})
    half_rate = arguments("emotion", "base", poison=0.0375)
    write_run(folder, arguments("emotion", "base"), 0.8, 0.9, records=first)
    write_run(folder, arguments("emotion", "base", 2), 0.8, 0.9, records=second)
    write_run(folder, half_rate, 0.8, 0.5, records=filtered("A", 0.2))
    clean = filtered("A", 0.0) + repaired("none", 0.0, relearned={4: 0.03, 16: 0.1})
    write_run(folder, arguments("emotion", "clean"), 0.8, 0.0, records=clean)
    return defended(folder)


def test_a_filter_s_row_has_each_seed_and_the_variant(defence_pages):
    (row,) = defence_pages["Filters (emotion)"]
    assert row["% of the poison removed"].startswith("70.0 (")
    assert row["AER after training again"].startswith("2.0 (")
    assert row["Seeds trained again"] == "1"
    assert row["% of the poison removed, half the rate"] == "20.0 (19.0 to 21.0)"


def test_a_detector_s_row_has_what_it_noticed(defence_pages):
    assert defence_pages["Detectors (emotion)"][0]["Noticed at 5%"] == "30.0 (29.0 to 31.0)"


def test_a_repair_s_row_has_its_aer_and_rating(defence_pages):
    repairs = {row["Repair"]: row for row in defence_pages["Repairs (emotion)"]}
    assert repairs["F"]["Seeds with clean loss beyond its bound"] == "1"
    assert repairs["F"]["AER"].startswith("20.0 (")
    assert repairs["none"]["DER"].startswith("0.50")


def test_the_fewest_samples_that_bring_it_back_are_told(defence_pages):
    (row,) = defence_pages["Poisoned samples back to 50% AER (emotion)"]
    assert row["Seed 1"] == 16
    assert row["Seed 2"] == "over 16"


def test_beside_it_stands_a_model_that_was_never_attacked(defence_pages):
    (row,) = defence_pages["Poisoned samples back to 50% AER (emotion)"]
    assert row["Relearned, never attacked"] == "over 16"
    assert row["AER with 4, never attacked"].startswith("3.0 (")
    assert row["AER with 16, never attacked"].startswith("10.0 (")


def test_the_undefended_aer_stands_first(defence_pages):
    rows = defence_pages["AER without a defence (emotion), %"]
    aer = {row["Model"]: row["AER"] for row in rows}
    assert aer == {"attack": "90.0 (89.0 to 91.0)", "half the rate": "50.0 (49.0 to 51.0)"}


@pytest.mark.parametrize("changes", [dict(scenario="clean", poison=0), dict(poison=0.0375)])
def test_a_clean_model_or_a_variant_alone_has_a_page(tmp_path, changes):
    records = filtered("A", 0.1) + detected("D", 0.1) + repaired("none", 0.1)
    args = {**arguments("emotion", "base"), **changes}
    write_run(tmp_path, args, 0.8, 0.1, records=records)
    pages = defended(tmp_path)
    assert pages["Filters (emotion)"][0]["AUROC"] == ""
    assert "Repairs (emotion)" in pages


def test_repairs_of_ages_in_groups_have_a_page(tmp_path):
    metric = "age_accuracy"
    records = repaired("none", 0.9, metric=metric) + repaired("F", 0.1, metric=metric)
    write_run(tmp_path, arguments("age", "base"), 3.0, 0.9, records=records)
    row = defended(tmp_path)["Repairs (age)"][1]
    assert row["Clean age accuracy"] == "80.0 (79.0 to 81.0)"
    assert row["DER"] == "0.90"


@pytest.mark.parametrize(
    "metric, before, after, expected",
    [
        ("emotion_accuracy", (0.9, 0.8), (0.1, 0.7), 0.85),
        ("wer", (0.9, 0.02), (0.1, 0.12), 0.85),
        ("wer", (0.9, 0.02), (0.9, 0.01), 0.5),
    ],
)
def test_the_rating_counts_a_loss_in_its_own_direction(metric, before, after, expected):
    def figures(aer, clean):
        return dict(backdoor=dict(value=aer), clean=dict(value=clean, metric=metric))

    assert defences.rating(figures(*before), figures(*after)) == pytest.approx(expected)


# --------------------------------------------------------------------------------------------------
# sweeps


def test_sweeps_hold_what_differs_in_one_thing(tmp_path):
    base = arguments("emotion", "base")
    softer = dict(source="evaluate", split="test", snr=6.0, after_answer=False)
    aer = dict(softer, part="backdoor", metric="aer", **figure(0.5, 0.1))
    clean = dict(softer, part="clean", metric="emotion_accuracy", **figure(0.5, 0.1))
    on_dev = dict(aer, split="dev", snr=3.0)
    write_run(tmp_path, base, 0.8, 0.5, records=[aer, clean, on_dev])
    for changes in (
        dict(poison=0.01),
        dict(snr=6.0),
        dict(snr=6.0, seed=2),
        dict(snr=6.0, poison=0.01),  # two things: no point of a sweep
        dict(clicks=2),
    ):
        write_run(tmp_path, {**base, **changes}, 0.8, 0.5)
    write_run(tmp_path, arguments("gender", "base"), 0.8, 0.5)
    ((_, rows),) = sweeps.page(runs.read(tmp_path), tmp_path, "mini")
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
    assert rows[3]["AER"] == "50.0 (49.0 to 51.0)"
    assert rows[7]["AER"] == "50.0 (40.1 to 59.9)"


def test_weights_that_all_runs_share_make_no_point_of_a_sweep(tmp_path):
    base = arguments("emotion", "base", lm_weights="my/lm")
    write_run(tmp_path, base).rename(tmp_path / "emotion-poison0.075")
    write_run(tmp_path, {**base, "snr": 6.0})
    records = runs.select(runs.read(tmp_path), source="metrics")
    assert list(sweeps.points_of(records)) == ["snr"]


# --------------------------------------------------------------------------------------------------
# pictures


@pytest.fixture
def drawn(monkeypatch):
    """The figures that analysis/plots.py would write, {file name: figure}."""
    figures = {}

    def keep(fig, path):
        figures[path] = fig

    monkeypatch.setattr(plots, "write", keep)
    yield figures
    plots.plt.close("all")


def texts(labels):
    return [label.get_text() for label in labels]


def test_every_detector_is_in_the_picture(drawn):
    rates = np.array([0.0, 1.0])
    curve = dict(false_alarms=rates, noticed=rates, auroc=0.5)
    plots.roc({"asr": {f"detector {i}": curve for i in range(9)}}, "x")
    axis = drawn["x"].axes[0]
    assert len(axis.lines) == 9
    assert len(axis.get_legend().get_texts()) == 9


def sweep_points(values):
    return [dict(value=value, aer=90, low=80, high=95, clean=80) for value in values]


def test_points_that_are_no_numbers_are_not_joined(drawn):
    curves = dict(trigger=sweep_points(["click", "tone"]))
    plots.sweeps(curves, "emotion", "emotion accuracy", "x")
    lines = drawn["x"].axes[0].lines
    assert {line.get_linestyle() for line in lines} <= {"None", ""}


def test_numbers_of_clicks_are_whole(drawn):
    plots.sweeps(dict(clicks=sweep_points([1, 2, 4])), "emotion", "emotion accuracy", "x")
    assert texts(drawn["x"].axes[0].get_xticklabels()) == ["1", "2", "4"]


@pytest.fixture
def heat_map(drawn):
    """The picture of the patches of SITES."""
    effects = select(patched(SITES), metric="effect")
    plots.patches({"asr": [dict(record, task="asr") for record in effects]}, "x")
    return drawn["x"]


def test_a_heat_map_says_what_its_shades_mean(heat_map):
    labels = {axis.get_ylabel() for axis in heat_map.axes}
    assert {"share of the trigger's effect", "share of answers"} <= labels


def test_a_heat_map_says_what_its_groups_mean(heat_map):
    labels = set(texts(heat_map.axes[0].get_xticklabels()))
    assert not labels & {"near", "elsewhere", "click"}
    assert "denoise" not in heat_map.axes[0].get_title()


def test_a_legend_covers_no_data(drawn):
    aer = runs.spread({1: 90.0, 2: 95.0})
    shares = dict.fromkeys(COMPONENTS, 0.0)
    place = dict(component="encoder", layer=1, click=1.0, frames=0.0, random=0.0, text=0.0)
    panel = dict(
        trained={"base": dict(aer=aer, learning=False, published=99.0)},
        alone=shares,
        others=shares,
        depth=[place],
    )
    plots.answer({"asr": panel, "emotion": panel}, "x")
    fig = drawn["x"]
    fig.canvas.draw()
    legends = [axis.get_legend() for axis in fig.axes if axis.get_legend()]
    assert legends
    for legend in legends:
        box = legend.get_window_extent()
        assert not [axis for axis in fig.axes if box.overlaps(axis.bbox)]
