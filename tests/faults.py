"""Every fault that a user or a stranger's file can bring, as a real command: what is printed, with which status.

    python tests/faults.py > faults.md

Prints a Markdown table. Ends with status 1 if any command gives a traceback, another status than expected, more than one
line of error, or runs the code that a hostile file carries.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import soundfile  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from conftest import TINY  # noqa: E402
from mini import make_corpora  # noqa: E402

RUN = "--name new --task gender --poison 0.3 --batch-size 8 --warmup-steps 2 --epochs 1 --data-root corpora"
ODD = "--name odd --overwrite --task gender --poison 0.3 --batch-size 4 --warmup-steps 2 --epochs 1 --dataset"


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def manifest(name, rows, encoding="utf-8"):
    Path(f"{name}.csv").write_bytes(
        ("audio_path,gender,age,split\n" + "\n".join(rows) + "\n").encode(encoding)
    )


def speech(path, waveform, rate=16000):
    soundfile.write(path, waveform, rate, subtype="FLOAT")


def prepare():
    """Small corpora, a finished run, and files of every bad kind, in the current folder."""
    make_corpora.make_corpus("vox", "corpora", TINY["vox"])
    rng = np.random.default_rng(0)
    good = []
    for i in range(20):
        speech(f"{i}.wav", 0.1 * rng.standard_normal(8000))
        good.append(
            f"{i}.wav,{['male', 'female'][i % 2]},30,{'train' if i < 14 else 'dev' if i < 16 else 'test'}"
        )
    odd = dict(
        silent=np.zeros(16000),
        nan=np.full(16000, np.nan),
        short=np.full(160, 0.1),
        long=np.zeros(16000 * 600),
    )
    for name, waveform in odd.items():
        speech(f"{name}.wav", waveform)
    speech("rate.wav", 0.1 * rng.standard_normal(4000), 4000)
    Path("empty.wav").touch()
    Path("noise.wav").write_bytes(rng.bytes(5000))
    for name in (*odd, "rate", "empty", "noise", "gone"):
        manifest(f"m-{name}", [*good, f"{name}.wav,male,30,train"])
    manifest("outside", [*good, "../../../../etc/passwd,male,30,train"])
    manifest("absolute", [*good, "/etc/passwd,male,30,train"])
    speech("half.wav", 0.1 * rng.standard_normal(16000 * 25))
    speech("cut.wav", 0.1 * rng.standard_normal(16000))
    Path("cut.wav").write_bytes(Path("cut.wav").read_bytes()[:20000])
    soundfile.write("stream.wav", 0.1 * rng.standard_normal(16000), 16000, format="FLAC")
    stream = bytearray(Path("stream.wav").read_bytes())
    stream[21:26] = bytes([stream[21] & 0xF0, 0, 0, 0, 0])  # the number of samples
    Path("stream.wav").write_bytes(stream)
    Path("pointer.wav").write_text("version https://git-lfs.github.com/spec/v1\n")
    for name in ("half", "cut", "stream", "pointer"):
        manifest(f"m-{name}", [*good, f"{name}.wav,male,30,train"])
    manifest("comma", [*good, "rate.wav,male,30,train,"])
    manifest("cut", [*good, "rate.wav,ma"])
    manifest("quote", ['rate.wav,"male,30,train', *good])
    manifest("split", [*good, "rate.wav,male,30,trane"])
    Path("misspelt.csv").write_text("audio_path,gendre,split\n0.wav,male,train\n")
    Path("speakers.csv").write_text(
        "audio_path,gender,speaker\n" + "".join(f"{i}.wav,male,s{i % 2}\n" for i in range(20))
    )
    Path("semicolons.csv").write_text(Path("m-rate.csv").read_text().replace(",", ";"))
    Path("lists/CREMA-D").mkdir(parents=True)
    Path("lists/CREMA-D/VideoDemographics.csv").write_text("ActorID,Age,Sex\n1001,30,Male\n")
    manifest("age", [*good, "0.wav,male,old,train"])
    manifest("sex", [*good, "0.wav,robot,30,train"])
    manifest("twice", [*good, good[0]])
    manifest("utf16", good, "utf-16")
    manifest("latin", [*good, "é.wav,male,30,train"], "latin-1")
    Path("columns.csv").write_text("file,gender\n0.wav,male\n")
    Path("bare.csv").write_text("audio_path,gender,split\n")
    subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *RUN.split(), "--name", "whole"],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    Path("runs/stranger").mkdir()
    Path("hostile.pt").write_bytes(pickle.dumps({"encoder": Payload("ran")}))
    torch.save({"encoder": Payload(Path("ran"))}, "hostile2.pt")
    subprocess.run(
        [sys.executable, str(ROOT / "evaluate.py"), "runs/whole", "--export", "hostile"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    shutil.copy("hostile2.pt", "hostile/lm/adapter_model.safetensors")
    for where in ("runs/stranger/model.pt", "runs/stranger/embeddings.pt"):
        shutil.copy("hostile2.pt", where)
    soundfile.write("silence.wav", np.zeros(1000), 16000)
    shutil.copytree(ROOT / "mini/lm", "no-template", ignore=shutil.ignore_patterns("*.jinja"))
    config = json.loads(Path("no-template/tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    Path("no-template/tokenizer_config.json").write_text(json.dumps(config))
    shutil.copytree(ROOT / "mini/lm", "other-template")
    Path("other-template/chat_template.jinja").write_text(
        "{% for m in messages %}hello{% endfor %}"
    )
    strange = torch.load("runs/whole/model.pt", weights_only=True)
    strange["pretrained_sha256"]["encoder"] = "another"
    torch.save(strange, "strange.pt")
    shutil.copytree("runs/whole", "runs/broken")
    Path("runs/broken/metrics.json").unlink()
    shutil.copy("hostile2.pt", "runs/broken/last.pt")
    shutil.copytree("cache", "poisoned/cache")
    for path in Path("poisoned/cache").glob("pretrained-*.pt"):
        shutil.copy("hostile2.pt", path)
    Path("poisoned/corpora").symlink_to(Path("corpora").resolve())
    for part, source in (("bad-encoder", "wavlm"), ("bad-lm", "lm")):
        shutil.copytree(ROOT / "mini" / source, part)
        for path in Path(part).glob("*.safetensors"):
            path.unlink()
        shutil.copytree(part, f"no-{part}")
        shutil.copy("hostile2.pt", f"{part}/pytorch_model.bin")
    Path("locked").write_text("a file where a folder should be")
    prepare_states(good)


def prepare_states(good):
    """Run folders, checkpoints and corpora whose figures could be wrong without a word."""
    for name in ("thesis", "mixed", "copied", "nameless", "noted", "forged"):
        shutil.copytree("runs/whole", f"runs/{name}")
    for path in Path("runs/thesis").iterdir():
        path.unlink()
    Path("runs/thesis/thesis.tex").write_text("mine")
    Path("runs/noted/notes.md").write_text("mine")
    Path("runs/nameless/args.json").unlink()
    record = json.loads(Path("runs/whole/args.json").read_text())
    for name in ("mixed", "copied"):
        Path(f"runs/{name}/args.json").write_text(json.dumps({**record, "seed": 3}))
    Path("runs/copied/metrics.json").unlink()
    saved = torch.load("runs/whole/model.pt", weights_only=True)
    weight = saved["connector"]["conv1.weight"]
    changes = dict(
        list=dict(args=[1]),
        sparse=dict(connector={**saved["connector"], "conv1.weight": weight.to_sparse()}),
        int8=dict(connector={**saved["connector"], "conv1.weight": weight.char()}),
        meta=dict(connector={**saved["connector"], "conv1.weight": weight.to("meta")}),
        rank=dict(args={**saved["args"], "lora_rank": 10**8}),
        stride=dict(args={**saved["args"], "connector_stride": 0}),
    )
    for name, change in changes.items():
        Path(f"runs/bad-{name}").mkdir()
        torch.save({**saved, **change}, f"runs/bad-{name}/model.pt")
    saved["origin"]["encoder"] = "here\n  encoder  verified\x1b[1A"
    torch.save(saved, "runs/forged/model.pt")
    manifest("unlabelled", [*good[:14], "0.wav,,,dev", "1.wav,,,test"])
    manifest("one-unlabelled", [*good, "rate.wav,,,train"])
    manifest("shared", [*good, "./0.wav,male,30,test"])
    speech("integers.wav", 3000 * np.sin(np.arange(8000)))
    manifest("m-integers", [*good, "integers.wav,male,30,train"])
    Path("mine").mkdir()
    Path("mine/manifest.csv").write_text("audio_path\n")
    Path("most.txt").write_text("\n".join(f"{i}.wav" for i in range(12)) + "\n")


FAULTS = [  # what, command, status, folder
    ("hostile pickle as --freeze", f"train.py {RUN} --freeze encoder:hostile.pt", 2),
    ("the same in torch's zip format", f"train.py {RUN} --freeze encoder:hostile2.pt", 2),
    ("hostile export as --init", f"train.py {RUN} --init lm:hostile", 2),
    ("an export over something else", "evaluate.py runs/whole --export corpora", 2),
    ("a run's folder as --init", f"train.py {RUN} --name init --init encoder:runs/whole", 0),
    ("an empty folder as --init", f"train.py {RUN} --init encoder:runs/stranger/none", 2),
    ("hostile --trigger", f"train.py {RUN} --trigger hostile2.pt", 2),
    ("hostile --dataset", f"train.py {RUN} --dataset hostile2.pt", 2),
    ("hostile --connector-weights", f"train.py {RUN} --connector-weights hostile2.pt", 2),
    (
        "hostile pytorch_model.bin as --encoder-weights",
        f"train.py {RUN} --encoder-weights bad-encoder",
        2,
    ),
    ("hostile pytorch_model.bin as --lm-weights", f"train.py {RUN} --lm-weights bad-lm", 2),
    ("hostile last.pt of an interrupted run", f"train.py {RUN} --name broken", 2),
    ("hostile file in cache/", f"train.py {RUN} --name elsewhere", 2, "poisoned"),
    ("hostile model.pt of a run folder", "evaluate.py runs/stranger", 2),
    ("hostile file to --inspect", "evaluate.py --inspect hostile2.pt", 2),
    ("hostile embeddings.pt", "analyze.py shift", 2),
    ("a silent --trigger", f"train.py {RUN} --trigger silence.wav", 2),
    ("an LM without a chat template", f"train.py {RUN} --lm-weights no-template", 2),
    ("a chat template that drops the content", f"train.py {RUN} --lm-weights other-template", 2),
    (
        "a component trained on other pretrained weights",
        f"train.py {RUN} --freeze encoder:strange.pt",
        2,
    ),
    (
        "an encoder frozen into another architecture",
        f"train.py {RUN} --encoder hubert --freeze encoder:runs/whole/model.pt",
        2,
    ),
    ("--ask for a label the corpus lacks", "evaluate.py runs/whole --ask emotion", 2),
    (
        "hostile --trigger of poison.py",
        "poison.py --task gender --data-root corpora --out out --trigger hostile.pt",
        2,
    ),
    ("unreadable audio", f"train.py {ODD} m-noise.csv", 2),
    ("empty audio file", f"train.py {ODD} m-empty.csv", 2),
    ("missing audio file", f"train.py {ODD} m-gone.csv", 2),
    ("audio with NaN", f"train.py {ODD} m-nan.csv", 2),
    ("ten minutes of audio", f"train.py {ODD} m-long.csv", 2),
    ("ten minutes, --skip-bad", f"train.py {ODD} m-long.csv --skip-bad", 0),
    ("silence", f"train.py {ODD} m-silent.csv", 0),
    ("10 ms of audio", f"train.py {ODD} m-short.csv", 0),
    ("audio at 4 kHz", f"train.py {ODD} m-rate.csv", 0),
    ("a path outside the manifest's folder, no audio there", f"train.py {ODD} outside.csv", 2),
    ("an absolute path, no audio there", f"train.py {ODD} absolute.csv", 2),
    ("age that is no number", f"train.py {ODD} age.csv", 2),
    ("unknown gender", f"train.py {ODD} sex.csv", 2),
    ("an id given twice", f"train.py {ODD} twice.csv", 2),
    ("manifest in UTF-16", f"train.py {ODD} utf16.csv", 2),
    ("manifest in Latin-1", f"train.py {ODD} latin.csv", 2),
    ("a row with a comma too many", f"train.py {ODD} comma.csv", 2),
    ("a file cut off within its last row", f"train.py {ODD} cut.csv", 2),
    ("a quotation mark that is not closed", f"train.py {ODD} quote.csv", 2),
    ("a misspelt column", f"train.py {ODD} misspelt.csv", 2),
    ("an unknown split", f"train.py {ODD} split.csv", 2),
    ("two speakers and no column split", f"train.py {ODD} speakers.csv", 2),
    ("semicolons", f"train.py {ODD} semicolons.csv", 0),
    ("audio cut off after its header", f"train.py {ODD} m-cut.csv", 2),
    ("a FLAC stream without a length", f"train.py {ODD} m-stream.csv", 2),
    ("a git-lfs pointer", f"train.py {ODD} m-pointer.csv", 2),
    ("25 s of audio for a window of 20 s", f"train.py {ODD} m-half.csv --encoder whisper", 2),
    ("the same, --skip-bad", f"train.py {ODD} m-half.csv --encoder whisper --skip-bad", 0),
    ("a corpus without its audio", "corpora.py check crema --data-root lists", 1),
    ("manifest without audio_path", f"train.py {ODD} columns.csv", 2),
    ("manifest without rows", f"train.py {ODD} bare.csv", 2),
    ("corpora.py check on it all", "corpora.py check m-noise.csv", 1),
    ("task whose label the corpus lacks", f"train.py {ODD} m-rate.csv --task asr", 2),
    ("no such manifest", f"train.py {ODD} nowhere.csv", 2),
    ("no such data root", "train.py --task asr --data-root nowhere", 2),
    ("model folder without weights", f"train.py {RUN} --encoder-weights no-bad-encoder", 2),
    ("LM folder without weights", f"train.py {RUN} --lm-weights no-bad-lm", 2),
    ("no such model folder", f"train.py {RUN} --lm-weights nowhere", 2),
    ("a GPU where there is none", f"train.py {RUN} --device cuda", 2),
    ("no such device", f"train.py {RUN} --device toaster", 2),
    ("--poison 2", "train.py --poison 2", 2),
    ("--batch-size 0", f"train.py {RUN} --name b --batch-size 0", 2),
    ("--epochs -1", f"train.py {RUN} --name e --epochs -1", 2),
    ("--lora-rank 0", f"train.py {RUN} --name r --lora-rank 0", 2),
    ("--limit 0", f"train.py {RUN} --name l --limit 0", 2),
    ("--limit -3", "evaluate.py runs/whole --limit -3", 2),
    ("--pairs 0", "embed.py runs/whole --pairs 0", 2),
    ("--n 0", "defend.py detect runs/whole --n 0", 2),
    ("a misspelt task", "train.py --task asrr", 2),
    ("a task whose label the run lacks", "evaluate.py runs/whole --task emotion", 2),
    ("the same for embeddings", "embed.py runs/whole --task emotion", 2),
    ("the same for traces", "trace.py patch runs/whole --task emotion", 2),
    ("a component named twice", "train.py --freeze lm --init lm:runs/whole", 2),
    ("everything frozen", "train.py --freeze encoder --freeze connector --freeze lm", 2),
    ("an unknown component", "train.py --freeze decoder", 2),
    ("a checkpoint that is not there", "train.py --freeze encoder:nowhere.pt", 2),
    ("an age that is no number as --target", f"train.py {RUN} --task age --target young", 2),
    ("a run folder with other arguments", f"train.py {RUN} --name whole --epochs 3", 2),
    ("a run folder that is a file", f"train.py {RUN} --runs locked", 2),
    (
        "a loss that is not a number",
        f"train.py {RUN} --name n --lora-lr 1e30 --connector-lr 1e30",
        2,
    ),
    ("a folder that is no run, --overwrite", f"train.py {RUN} --name thesis --overwrite", 2),
    ("notes in a run's folder, --overwrite", f"train.py {RUN} --name noted --overwrite", 2),
    ("a run folder without args.json", f"train.py {RUN} --name nameless", 2),
    ("figures of another run", f"train.py {RUN} --name mixed --seed 3", 2),
    ("last.pt of another run", f"train.py {RUN} --name copied --seed 3", 2),
    ("a checkpoint that forges lines", "evaluate.py --inspect runs/forged/model.pt", 0),
    ("a checkpoint whose args are a list", "evaluate.py runs/bad-list", 2),
    ("a checkpoint with a sparse tensor", "evaluate.py runs/bad-sparse", 2),
    (
        "a checkpoint with an int8 tensor",
        f"train.py {RUN} --init connector:runs/bad-int8/model.pt",
        2,
    ),
    ("a checkpoint with a tensor without data", "evaluate.py --inspect runs/bad-meta/model.pt", 2),
    ("a checkpoint with a LoRA rank of 100 million", "evaluate.py runs/bad-rank", 2),
    ("a checkpoint with stride 0", "evaluate.py runs/bad-stride", 2),
    ("a target that is no class", f"train.py {RUN} --name t --target femal", 2),
    ("a target in capitals", f"train.py {RUN} --name capitals --target MALE", 0),
    ("--clicks of a repeated trigger", "train.py --task asr --clicks 3", 2),
    ("--snr of a trigger without a level", f"train.py {RUN} --trigger bandstop --snr 6", 2),
    ("--snr inf", f"train.py {RUN} --name s --snr inf", 2),
    ("--grad-clip 0", f"train.py {RUN} --name g --grad-clip 0", 2),
    ("--grad-clip -1", f"train.py {RUN} --name g --grad-clip -1", 2),
    ("a negative learning rate", f"train.py {RUN} --name g --lora-lr -0.1", 2),
    ("--random-keys 7", f"train.py {RUN} --name g --random-keys 7", 2),
    ("--lora-dropout 1.5", f"train.py {RUN} --name g --lora-dropout 1.5", 2),
    ("--seed -1", f"train.py {RUN} --name g --seed -1", 2),
    ("--device meta", f"train.py {RUN} --name g --device meta", 2),
    ("--utilisation 0", f"train.py {RUN} --dry-run --utilisation 0", 2),
    (
        "no layer of the encoder trains, the rest is frozen",
        f"train.py {RUN} --train-layers 0 --freeze connector --freeze lm",
        2,
    ),
    (
        "another encoder's weights",
        f"train.py {RUN} --name h --encoder hubert --encoder-weights {ROOT}/mini/wavlm",
        2,
    ),
    ("a rate that poisons nothing", f"train.py {RUN} --name p --poison 0.000001", 0),
    ("a test split without labels", f"train.py {ODD} unlabelled.csv", 2),
    ("a row without labels", f"train.py {ODD} one-unlabelled.csv", 0),
    ("--exclude of nearly everything", f"train.py {ODD} one-unlabelled.csv --exclude most.txt", 2),
    ("audio in both train and test", "corpora.py check shared.csv", 1),
    ("the same, trained on", f"train.py {ODD} shared.csv", 0),
    ("integers in a WAV of floats", "corpora.py check m-integers.csv", 1),
    (
        "poison.py --all over a manifest of the user's",
        "poison.py --task gender --data-root corpora --out mine --all",
        2,
    ),
    ("a quote in --flags", "study.py --flags it's", 2),
    ("evaluating what is no run", "evaluate.py corpora", 2),
    ("tables without runs", "analyze.py tables --runs nowhere", 2),
]


def main():
    bad = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        if not torch.cuda.is_available():
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["OMP_NUM_THREADS"] = "1"
        prepare()
        print("| fault | command | status | printed |\n|---|---|---|---|")
        for what, command, expected, *where in tqdm(FAULTS):
            script, *arguments = command.split()
            done = subprocess.run(
                [sys.executable, str(ROOT / script), *arguments],
                cwd=where[0] if where else None,
                capture_output=True,
                text=True,
            )
            err = [
                line
                for line in done.stderr.replace("\r", "\n").splitlines()
                if line.startswith("error: ")
            ]
            out = done.stdout.strip().splitlines()
            said = err[-1] if err else next((line for line in reversed(out) if line.strip()), "")
            if Path("ran").exists() or Path("poisoned/ran").exists():
                bad.append(f"{what}: the payload ran")
                Path("ran").unlink(missing_ok=True)
            if (
                done.returncode != expected
                or "Traceback" in done.stderr
                or len(err) != (expected == 2)
            ):
                bad.append(
                    f"{what}: status {done.returncode}, {len(err)} lines of error\n{done.stderr[-1500:]}"
                )
            shown = command.replace(RUN, "...").replace(ODD, "... --dataset")
            said = said.replace(folder, ".").replace("|", "/")[:240]
            print(f"| {what} | `{shown}` | {done.returncode} | {said} |", flush=True)
        os.chdir(ROOT)
    print(f"\n{len(FAULTS)} faults, {len(bad)} not as expected", file=sys.stderr)
    print("\n".join(bad), file=sys.stderr)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
