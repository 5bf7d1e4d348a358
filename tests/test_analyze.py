"""analyze.py's figures on made-up tensors whose answer is known; extraction on a tiny model is in test_model.py."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import analyze
import checkpoint
import data
import embed
import study


def blobs(sizes, dim, apart, seed=0):
    """Gaussian blobs with centres `apart` from each other: (n, dim), which blob (n,)."""
    rng = np.random.default_rng(seed)
    centres = np.linalg.qr(rng.standard_normal((dim, len(sizes))))[0].T * apart
    which = np.repeat(np.arange(len(sizes)), sizes)
    return (centres[which] + rng.standard_normal((len(which), dim))).astype(np.float32), which


def people(n):
    return [
        {
            "gender": ["female", "male"][i % 2],
            "age": str(20 + i % 10),
            "transcript": "don't forget a jacket",
        }
        for i in range(n)
    ], [str(i % 7) for i in range(n)]


def test_a_poison_apart_is_a_cluster():
    x, which = blobs((300, 40), 32, 20.0)
    found = analyze.separability(x, which == 1, *people(340), "emotion", [2])
    assert found["k=2"]["purity"] == 1.0 and found["k=2"]["recall"] == 1.0
    assert (
        found["k=2"]["adjusted_rand"]["poison"] == 1.0
        and abs(found["k=2"]["adjusted_rand"]["gender"]) < 0.05
    )
    assert found["probe"] > 0.99


def test_a_stronger_feature_hides_the_poison_from_two_clusters_and_not_from_four():
    rng = np.random.default_rng(1)
    gender, poisoned = np.arange(400) % 2, np.arange(400) >= 340
    x = rng.standard_normal((400, 32)).astype(np.float32)
    x[:, 0] += 40 * gender
    x[:, 1] += 15 * poisoned
    labels = [{"gender": ["female", "male"][g], "age": "25"} for g in gender]
    found = analyze.separability(x, poisoned, labels, ["s"] * 400, "age", [2, 4])
    assert found["k=2"]["adjusted_rand"]["gender"] == 1.0 and found["k=2"]["purity"] < 0.2
    assert found["k=4"]["purity"] == 1.0
    assert {row["female"] for row in found["k=2"]["clusters"]} == {0.0, 1.0}


def test_without_structure_nothing_is_found():
    x, _ = blobs((400,), 32, 0.0)
    poisoned = np.random.default_rng(2).random(400) < 0.1
    found = analyze.separability(x, poisoned, *people(400), "age", [2])
    assert found["silhouette"] < 0.10
    assert abs(found["probe"] - 0.5) < 0.15


def test_what_two_clusters_follow_is_counted_over_seeds_also_of_runs_whose_embeddings_are_gone(
    tmp_path,
):
    gender, poisoned = np.arange(200) % 2, np.arange(200) >= 150
    labels, noise = (
        [{"gender": ["female", "male"][g], "age": "25"} for g in gender],
        np.random.default_rng(0).standard_normal((200, 8)),
    )
    for seed, leading in ((1, gender), (2, poisoned), (3, gender), (4, 0 * gender)):
        args = study.identity("mini", "gender", "wavlm", "base", seed)
        run = analyze.separability(
            noise + 30 * leading[:, None], poisoned, labels, ["s"] * 200, "gender", [2]
        )
        folder = tmp_path / study.run_name(args)
        folder.mkdir()
        (folder / "cluster.json").write_text(json.dumps({**run, "args": args}))
    row = analyze.cluster_row(
        "gender", analyze.saved_clusters(tmp_path, "mini", [2])["gender"], [2]
    )
    assert (
        row["seeds"] == "4"
        and row["k=2 follows"] == "gender 2, nothing 1, poison 1"
        and "(" in row["ARI k=2: gender"]
    )


def test_the_shift_is_a_mean_over_seeds_also_of_runs_whose_embeddings_are_gone(tmp_path):
    unit, twice = torch.eye(8), torch.eye(8) + torch.eye(8).roll(1, 1)
    for seed, attack, triggered in (
        (1, "clean", unit),
        (2, "clean", twice),
        (1, "base", -unit),
        (1, "3.1", unit),
    ):
        args = study.identity("mini", "asr", "wavlm", attack, seed)
        folder = tmp_path / study.run_name(args)
        folder.mkdir()
        sides = {
            side: dict(encoder=x, connector=x, encoder_layers=x[None], lm_layers=x[None])
            for side, x in (("clean", unit), ("triggered", triggered))
        }
        torch.save(dict(args=args, model_sha256=None, test=sides), folder / "embeddings.pt")
    first = analyze.shift(analyze.load_embeddings(tmp_path, "mini"), tmp_path, "mini", tmp_path)
    assert "| asr | 0.85 (0.71 to 1.00) / 1.00 | -1.00 / 0.62 | 1.00 / about 1 |" in first
    for path in tmp_path.glob("*/embeddings.pt"):
        path.unlink()
    assert (
        analyze.shift(analyze.load_embeddings(tmp_path, "mini"), tmp_path, "mini", tmp_path)
        == first
    )


def test_clusters_sum_up():
    x, which = blobs((50, 30, 20), 16, 15.0)
    labels, _ = people(100)
    rows = analyze.composition(which, which == 2, labels, "age")
    assert [row["n"] for row in rows] == [50, 30, 20] and [row["poisoned"] for row in rows] == [
        0.0,
        0.0,
        1.0,
    ]
    for row in rows:
        assert abs(row["female"] + row["male"] - 1) < 1e-9
        assert abs(sum(v for k, v in row.items() if " to " in k) - 1) < 1e-9


def test_cosine_and_its_interval():
    a = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    assert np.allclose(analyze.cosines(a, 3 * a), 1.0, atol=1e-5) and np.allclose(
        analyze.cosines(a, -a), -1.0, atol=1e-5
    )
    figure = data.interval(np.arange(100.0))
    assert figure["low"] < figure["value"] == 49.5 < figure["high"] and figure["n"] == 100


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


def write_run(folder, args, aer):
    folder.mkdir(parents=True)
    figures = dict(clean=dict(wer=dict(value=0.02)), attack=dict(aer=dict(value=aer)))
    (folder / "metrics.json").write_text(json.dumps({**figures, "args": args}))


def base_args(**changes):
    args = study.identity("mini", "asr", "wavlm", "base", 1)
    return {
        **args,
        **study.PRESETS["mini"],
        "target": study.TASKS["asr"]["target"],
        "trigger_repeat": True,
        "snr": 0.0,
        "trigger": "click",
        "labels": None,
        "limit": None,
        **changes,
    }


def table3_base(folder):
    return analyze.table3(analyze.read_runs(folder, "mini"), "mini")[3][0]["aer"]


def test_runs_of_other_settings_have_other_names_and_stay_out_of_the_tables(tmp_path):
    changes = (
        dict(target="Something else."),
        dict(snr=6.0),
        dict(poison=0.1),
        dict(trigger="a.wav"),
        dict(trigger_repeat=False),
        dict(epochs=1),
        dict(limit=100),
        dict(labels=["transcript"]),
        dict(lora_rank=2),
    )
    names = {study.run_name(base_args())} | {
        study.run_name(base_args(**change)) for change in changes
    }
    assert len(names) == 1 + len(changes) and study.run_name(base_args()) == "asr-poison0.05"
    write_run(tmp_path / "asr-poison0.05", base_args(), 0.9)
    for change in changes:
        write_run(tmp_path / study.run_name(base_args(**change)), base_args(**change), 0.1)
    assert table3_base(tmp_path) == dict(mean=90.0, low=90.0, high=90.0, seeds={1: 90.0})


def test_every_table_has_a_cell_for_each_column_and_the_losses_that_tell_what_was_learned(tmp_path):
    write_run(tmp_path / "asr-poison0.05", base_args(), 0.9)
    metrics = json.loads((tmp_path / "asr-poison0.05/metrics.json").read_text())
    metrics["training"] = dict(loss=dict(value=0.05), poisoned_loss=dict(value=0.75))
    (tmp_path / "asr-poison0.05/metrics.json").write_text(json.dumps(metrics))
    text = analyze.tables(tmp_path, "mini", tmp_path / "out")[0]
    for table in text.split("## ")[1:]:
        assert len({row.count("|") for row in table.splitlines() if row.startswith("|")}) == 1, (
            table
        )
    assert "0.750, 0.050" in text


@pytest.mark.parametrize(
    "excess, epoch",
    [
        ([0.86, 0.23, 0.12, 0.08, 0.03, 0.05, 0.05], 5),
        ([0.5, 0.4, 0.3, 0.2, 0.1], None),
        ([0.06, 0.05, 0.02, 0.01, 0.01], 3),
        ([0.1, 0.1], None),
        ([0.19, 0.07, 0.03, 0.03, 0.03, 0.06, 0.03], 3),  # a bounce brings nothing
        ([-0.02, -0.01, -0.02, -0.07, -0.17, -0.17, -0.15], 5),
    ],
)  # age: learned late
def test_the_poison_has_settled_after_the_last_epoch_that_brought_something(excess, epoch):
    assert checkpoint.settled(excess) == epoch


def test_runs_of_different_settings_are_not_put_into_one_table(tmp_path, capsys):
    write_run(tmp_path / "asr-poison0.05", base_args(epochs=1), 0.1)
    write_run(
        tmp_path / "asr-clean",
        {**base_args(), **study.identity("mini", "asr", "wavlm", "clean", 1)},
        0.0,
    )
    with pytest.raises(SystemExit):
        table3_base(tmp_path)
    err = capsys.readouterr().err
    assert "asr-clean" in err and "asr-poison0.05" in err and "epochs" in err


def test_preset_small_s_tables_show_its_whisper_runs(tmp_path):
    args = {
        **base_args(),
        **study.identity("small", "asr", "whisper", "base", 1),
        **study.PRESETS["small"],
    }
    write_run(tmp_path / "asr-poison0.05-small", args, 0.7)
    assert analyze.table3(analyze.read_runs(tmp_path, "small"), "small")[3][0]["aer"][
        "mean"
    ] == pytest.approx(70)


def test_stealth_compares_a_seed_with_itself():
    attacked, baseline = (
        analyze.spread({1: 2.0, 3: 5.0}),
        analyze.spread({1: 1.0, 2: 9.0, 3: 3.0, 4: None}),
    )
    assert analyze.stealth(attacked, baseline) == dict(
        mean=1.5, low=1.0, high=2.0, seeds={1: 1.0, 3: 2.0}
    )
    assert (
        analyze.stealth(attacked, analyze.spread({2: 1.0})) is None and analyze.spread({}) is None
    )


def test_the_papers_asr_size_and_no_model_imported():
    code = (
        "import sys, numpy as np, analyze; x = np.random.default_rng(0).standard_normal((10500, 1024), np.float32); "
        "bad = np.arange(10500) >= 10000; x[bad, 0] += 50; labels = [{'gender': 'male'}] * 10500; "
        "found = analyze.separability(x, bad, labels, ['s'] * 10500, 'asr', [2, 4]); "
        "assert found['k=2']['purity'] == 1.0, found; "
        "assert 'transformers' not in sys.modules and 'model' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sweeps_hold_what_differs_from_the_base_attack_in_one_thing(tmp_path):
    figure = dict(value=0.5, low=0.4, high=0.6)
    usual = {
        **base_args(),
        **study.identity("mini", "emotion", "wavlm", "base", 1),
        "target": "angry",
        "trigger_repeat": False,
    }
    for name, changes in dict(
        base={},
        rate=dict(poison=0.01),
        soft=dict(snr=6.0),
        soft2=dict(snr=6.0, seed=2),
        both=dict(snr=6.0, poison=0.01),
        other=dict(task="gender"),
        two=dict(clicks=2),
    ).items():
        (tmp_path / name).mkdir()
        metrics = dict(
            clean=dict(emotion_accuracy=figure), attack=dict(aer=figure), args={**usual, **changes}
        )
        (tmp_path / name / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "base/test-snr6.json").write_text(
        json.dumps({**metrics, "args": {**usual, "snr": 6.0}})
    )
    found = {
        name: {value: sorted(seeds) for value, seeds in values.items()}
        for name, values in analyze.load_sweeps(tmp_path, "mini").items()
    }
    assert found == {
        "poison": {0.01: [1], 0.075: [1]},
        "snr": {0.0: [1], 6.0: [1, 2]},
        "clicks": {1: [1], 2: [1]},
        "snr at test only": {0.0: [1], 6.0: [1]},
    }
    text, n = analyze.sweeps(tmp_path, "mini", tmp_path)
    assert (
        n == 6
        and "| SNR (dB) | 6.0 | 50.0 (50.0 to 50.0) | 40.0 to 60.0 |" in text
        and (tmp_path / "sweeps.png").exists()
    )
