"""Every fault that a user or a stranger's file can bring, as a real command: what is printed, and
with which status it ends.

    python tests/faults.py > faults.md

Prints a Markdown table. The status is 1 if any command gives a traceback, another status than
expected, more than one line of error, or runs the code that a hostile file carries. test_faults.py
runs a few of the commands.
"""

import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from conftest import TINY, errors_in
from mini import make_corpora

RUN = (
    "--name new --task gender --poison 0.3 --batch-size 8 --warmup-steps 2 --epochs 1 "
    "--data-root corpora"
)
ODD = (
    "--name odd --overwrite --task gender --poison 0.3 --batch-size 4 --warmup-steps 2 --epochs 1 "
    "--dataset"
)


@dataclass
class Fault:
    what: str
    command: str
    status: int
    folder: str = "."  # where it runs


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def manifest(name, rows, encoding="utf-8"):
    text = "\n".join(["audio_path,gender,age,split", *rows]) + "\n"
    Path(f"{name}.csv").write_bytes(text.encode(encoding))


def speech(path, waveform, rate=16000):
    soundfile.write(path, waveform, rate, subtype="FLOAT")


def run(script, *arguments, **options):
    return subprocess.run([sys.executable, str(ROOT / script), *arguments], **options)


def prepare():
    """Small corpora, a finished run, and files of every bad kind, in the current folder."""
    make_corpora.make_corpus("vox", "corpora", TINY["vox"])
    rng = np.random.default_rng(0)
    good = prepare_audio(rng)
    prepare_manifests(good)
    quiet = dict(check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run("train.py", *RUN.split(), "--name", "whole", **quiet)
    run("evaluate.py", "runs/whole", "--export", "hostile", **quiet)
    prepare_hostile_files()
    prepare_parts()
    prepare_states(good)


def prepare_audio(rng):
    """Recordings, good and bad, and a manifest for each bad one; returns the good ones' rows."""
    good = []
    for i in range(20):
        speech(f"{i}.wav", 0.1 * rng.standard_normal(8000))
        gender = "female" if i % 2 else "male"
        split = "train" if i < 14 else "test"
        good.append(f"{i}.wav,{gender},30,{'dev' if i in (14, 15) else split}")
    speech("silent.wav", np.zeros(16000))
    speech("nan.wav", np.full(16000, np.nan))
    speech("short.wav", np.full(160, 0.1))
    speech("long.wav", np.zeros(16000 * 600))
    speech("rate.wav", 0.1 * rng.standard_normal(4000), 4000)
    speech("half.wav", 0.1 * rng.standard_normal(16000 * 25))
    Path("empty.wav").touch()
    Path("noise.wav").write_bytes(rng.bytes(5000))
    speech("cut.wav", 0.1 * rng.standard_normal(16000))
    Path("cut.wav").write_bytes(Path("cut.wav").read_bytes()[:20000])
    soundfile.write("stream.wav", 0.1 * rng.standard_normal(16000), 16000, format="FLAC")
    stream = bytearray(Path("stream.wav").read_bytes())
    stream[21:26] = bytes([stream[21] & 0xF0, 0, 0, 0, 0])  # the number of samples
    Path("stream.wav").write_bytes(stream)
    Path("pointer.wav").write_text("version https://git-lfs.github.com/spec/v1\n")
    soundfile.write("silence.wav", np.zeros(1000), 16000)
    for name in ("silent", "nan", "short", "long", "rate", "empty", "noise", "gone"):
        manifest(f"m-{name}", [*good, f"{name}.wav,male,30,train"])
    for name in ("half", "cut", "stream", "pointer"):
        manifest(f"m-{name}", [*good, f"{name}.wav,male,30,train"])
    return good


def prepare_manifests(good):
    """Manifests with a fault of their own."""
    manifest("outside", [*good, "../../../../etc/passwd,male,30,train"])
    manifest("absolute", [*good, "/etc/passwd,male,30,train"])
    manifest("comma", [*good, "rate.wav,male,30,train,"])
    manifest("cut", [*good, "rate.wav,ma"])
    manifest("quote", ['rate.wav,"male,30,train', *good])
    manifest("split", [*good, "rate.wav,male,30,trane"])
    manifest("age", [*good, "0.wav,male,old,train"])
    manifest("sex", [*good, "0.wav,robot,30,train"])
    manifest("twice", [*good, good[0]])
    manifest("utf16", good, "utf-16")
    manifest("latin", [*good, "é.wav,male,30,train"], "latin-1")
    Path("misspelt.csv").write_text("audio_path,gendre,split\n0.wav,male,train\n")
    rows = [f"{i}.wav,male,s{i % 2}\n" for i in range(20)]
    Path("speakers.csv").write_text("audio_path,gender,speaker\n" + "".join(rows))
    Path("semicolons.csv").write_text(Path("m-rate.csv").read_text().replace(",", ";"))
    Path("columns.csv").write_text("file,gender\n0.wav,male\n")
    Path("bare.csv").write_text("audio_path,gender,split\n")
    Path("lists/CREMA-D").mkdir(parents=True)
    Path("lists/CREMA-D/VideoDemographics.csv").write_text("ActorID,Age,Sex\n1001,30,Male\n")


def prepare_hostile_files():
    """Pickles that make a file when they are loaded, wherever a checkpoint is read."""
    Path("hostile.pt").write_bytes(pickle.dumps({"encoder": Payload("ran")}))
    torch.save({"encoder": Payload(Path("ran"))}, "hostile2.pt")
    Path("runs/stranger").mkdir()
    shutil.copytree("runs/whole", "runs/broken")
    Path("runs/broken/metrics.json").unlink()
    shutil.copytree("cache", "poisoned/cache")
    Path("poisoned/corpora").symlink_to(Path("corpora").resolve())
    for path in (
        "hostile/lm/adapter_model.safetensors",
        "runs/stranger/model.pt",
        "runs/stranger/embeddings.pt",
        "runs/broken/last.pt",
        *Path("poisoned/cache").glob("pretrained-*.pt"),
    ):
        shutil.copy("hostile2.pt", path)


def prepare_parts():
    """Pretrained parts that lack something or are not what they seem."""
    shutil.copytree(ROOT / "mini/lm", "no-template", ignore=shutil.ignore_patterns("*.jinja"))
    config = json.loads(Path("no-template/tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    Path("no-template/tokenizer_config.json").write_text(json.dumps(config))
    shutil.copytree(ROOT / "mini/lm", "other-template")
    template = "{% for m in messages %}hello{% endfor %}"
    Path("other-template/chat_template.jinja").write_text(template)
    strange = torch.load("runs/whole/model.pt", weights_only=True)
    strange["pretrained_sha256"]["encoder"] = "another"
    torch.save(strange, "strange.pt")
    for part, source in (("bad-encoder", "wavlm"), ("bad-lm", "lm")):
        shutil.copytree(ROOT / "mini" / source, part)
        for path in Path(part).glob("*.safetensors"):
            path.unlink()
        shutil.copytree(part, f"no-{part}")
        shutil.copy("hostile2.pt", f"{part}/pytorch_model.bin")
    Path("locked").write_text("a file where a folder should be")


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

    def with_weight(changed):
        return dict(connector={**saved["connector"], "conv1.weight": changed})

    def with_arguments(**changed):
        return dict(args={**saved["args"], **changed})

    changes = dict(
        list=dict(args=[1]),
        sparse=with_weight(weight.to_sparse()),
        int8=with_weight(weight.char()),
        meta=with_weight(weight.to("meta")),
        rank=with_arguments(lora_rank=10**8),
        stride=with_arguments(connector_stride=0),
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


FAULTS = [
    Fault("hostile pickle as --freeze", f"train.py {RUN} --freeze encoder:hostile.pt", 2),
    Fault("the same in torch's zip format", f"train.py {RUN} --freeze encoder:hostile2.pt", 2),
    Fault("hostile export as --init", f"train.py {RUN} --init lm:hostile", 2),
    Fault("an export over something else", "evaluate.py runs/whole --export corpora", 2),
    Fault("a run's folder as --init", f"train.py {RUN} --name init --init encoder:runs/whole", 0),
    Fault("an empty folder as --init", f"train.py {RUN} --init encoder:runs/stranger/none", 2),
    Fault("hostile --trigger", f"train.py {RUN} --trigger hostile2.pt", 2),
    Fault("hostile --dataset", f"train.py {RUN} --dataset hostile2.pt", 2),
    Fault("hostile --connector-weights", f"train.py {RUN} --connector-weights hostile2.pt", 2),
    Fault(
        "hostile pytorch_model.bin as --encoder-weights",
        f"train.py {RUN} --encoder-weights bad-encoder",
        2,
    ),
    Fault("hostile pytorch_model.bin as --lm-weights", f"train.py {RUN} --lm-weights bad-lm", 2),
    Fault("hostile last.pt of an interrupted run", f"train.py {RUN} --name broken", 2),
    Fault("hostile file in cache/", f"train.py {RUN} --name elsewhere", 2, "poisoned"),
    Fault("hostile model.pt of a run folder", "evaluate.py runs/stranger", 2),
    Fault("hostile file to --inspect", "evaluate.py --inspect hostile2.pt", 2),
    Fault("hostile embeddings.pt", "analyze.py shift", 2),
    Fault("a silent --trigger", f"train.py {RUN} --trigger silence.wav", 2),
    Fault("an LM without a chat template", f"train.py {RUN} --lm-weights no-template", 2),
    Fault(
        "a chat template that drops the content", f"train.py {RUN} --lm-weights other-template", 2
    ),
    Fault(
        "a component trained on other pretrained weights",
        f"train.py {RUN} --freeze encoder:strange.pt",
        2,
    ),
    Fault(
        "an encoder frozen into another architecture",
        f"train.py {RUN} --encoder hubert --freeze encoder:runs/whole/model.pt",
        2,
    ),
    Fault("--ask for a label the corpus lacks", "evaluate.py runs/whole --ask emotion", 2),
    Fault(
        "hostile --trigger of poison.py",
        "poison.py --task gender --data-root corpora --out out --trigger hostile.pt",
        2,
    ),
    Fault("unreadable audio", f"train.py {ODD} m-noise.csv", 2),
    Fault("empty audio file", f"train.py {ODD} m-empty.csv", 2),
    Fault("missing audio file", f"train.py {ODD} m-gone.csv", 2),
    Fault("audio with NaN", f"train.py {ODD} m-nan.csv", 2),
    Fault("ten minutes of audio", f"train.py {ODD} m-long.csv", 0),
    Fault("ten minutes, --skip-bad", f"train.py {ODD} m-long.csv --skip-bad", 0),
    Fault("silence", f"train.py {ODD} m-silent.csv", 0),
    Fault("10 ms of audio", f"train.py {ODD} m-short.csv", 0),
    Fault("audio at 4 kHz", f"train.py {ODD} m-rate.csv", 0),
    Fault("a path outside the manifest's folder, no audio there", f"train.py {ODD} outside.csv", 2),
    Fault("an absolute path, no audio there", f"train.py {ODD} absolute.csv", 2),
    Fault("age that is no number", f"train.py {ODD} age.csv", 2),
    Fault("unknown gender", f"train.py {ODD} sex.csv", 2),
    Fault("an id given twice", f"train.py {ODD} twice.csv", 2),
    Fault("manifest in UTF-16", f"train.py {ODD} utf16.csv", 2),
    Fault("manifest in Latin-1", f"train.py {ODD} latin.csv", 2),
    Fault("a row with a comma too many", f"train.py {ODD} comma.csv", 2),
    Fault("a file cut off within its last row", f"train.py {ODD} cut.csv", 2),
    Fault("a quotation mark that is not closed", f"train.py {ODD} quote.csv", 2),
    Fault("a misspelt column", f"train.py {ODD} misspelt.csv", 2),
    Fault("an unknown split", f"train.py {ODD} split.csv", 2),
    Fault("two speakers and no column split", f"train.py {ODD} speakers.csv", 2),
    Fault("semicolons", f"train.py {ODD} semicolons.csv", 0),
    Fault("audio cut off after its header", f"train.py {ODD} m-cut.csv", 2),
    Fault("a FLAC stream without a length", f"train.py {ODD} m-stream.csv", 2),
    Fault("a git-lfs pointer", f"train.py {ODD} m-pointer.csv", 2),
    Fault("25 s of audio for a window of 20 s", f"train.py {ODD} m-half.csv --encoder whisper", 0),
    Fault("the same, --skip-bad", f"train.py {ODD} m-half.csv --encoder whisper --skip-bad", 0),
    Fault("a corpus without its audio", "corpora.py check crema --data-root lists", 1),
    Fault("manifest without audio_path", f"train.py {ODD} columns.csv", 2),
    Fault("manifest without rows", f"train.py {ODD} bare.csv", 2),
    Fault("corpora.py check on it all", "corpora.py check m-noise.csv", 1),
    Fault("task whose label the corpus lacks", f"train.py {ODD} m-rate.csv --task asr", 2),
    Fault("no such manifest", f"train.py {ODD} nowhere.csv", 2),
    Fault("no such data root", "train.py --task asr --data-root nowhere", 2),
    Fault("model folder without weights", f"train.py {RUN} --encoder-weights no-bad-encoder", 2),
    Fault("LM folder without weights", f"train.py {RUN} --lm-weights no-bad-lm", 2),
    Fault("no such model folder", f"train.py {RUN} --lm-weights nowhere", 2),
    Fault("a GPU where there is none", f"train.py {RUN} --device cuda", 2),
    Fault("no such device", f"train.py {RUN} --device toaster", 2),
    Fault("--poison 2", "train.py --poison 2", 2),
    Fault("--batch-size 0", f"train.py {RUN} --name b --batch-size 0", 2),
    Fault("--epochs -1", f"train.py {RUN} --name e --epochs -1", 2),
    Fault("--lora-rank 0", f"train.py {RUN} --name r --lora-rank 0", 2),
    Fault("--limit 0", f"train.py {RUN} --name l --limit 0", 2),
    Fault("--limit -3", "evaluate.py runs/whole --limit -3", 2),
    Fault("--pairs 0", "embed.py runs/whole --pairs 0", 2),
    Fault("--n 0", "defend.py detect runs/whole --n 0", 2),
    Fault("a misspelt task", "train.py --task asrr", 2),
    Fault("a task whose label the run lacks", "evaluate.py runs/whole --task emotion", 2),
    Fault("the same for embeddings", "embed.py runs/whole --task emotion", 2),
    Fault("the same for traces", "trace.py patch runs/whole --task emotion", 2),
    Fault("a component named twice", "train.py --freeze lm --init lm:runs/whole", 2),
    Fault("everything frozen", "train.py --freeze encoder --freeze connector --freeze lm", 2),
    Fault("an unknown component", "train.py --freeze decoder", 2),
    Fault("a checkpoint that is not there", "train.py --freeze encoder:nowhere.pt", 2),
    Fault("an age that is no number as --target", f"train.py {RUN} --task age --target young", 2),
    Fault("a run folder with other arguments", f"train.py {RUN} --name whole --epochs 3", 2),
    Fault("a run folder that is a file", f"train.py {RUN} --runs locked", 2),
    Fault(
        "a loss that is not a number",
        f"train.py {RUN} --name n --lora-lr 1e30 --connector-lr 1e30",
        2,
    ),
    Fault("a folder that is no run, --overwrite", f"train.py {RUN} --name thesis --overwrite", 2),
    Fault("notes in a run's folder, --overwrite", f"train.py {RUN} --name noted --overwrite", 2),
    Fault("a run folder without args.json", f"train.py {RUN} --name nameless", 2),
    Fault("figures of another run", f"train.py {RUN} --name mixed --seed 3", 2),
    Fault("last.pt of another run", f"train.py {RUN} --name copied --seed 3", 2),
    Fault("a checkpoint that forges lines", "evaluate.py --inspect runs/forged/model.pt", 0),
    Fault("a checkpoint whose args are a list", "evaluate.py runs/bad-list", 2),
    Fault("a checkpoint with a sparse tensor", "evaluate.py runs/bad-sparse", 2),
    Fault(
        "a checkpoint with an int8 tensor",
        f"train.py {RUN} --init connector:runs/bad-int8/model.pt",
        2,
    ),
    Fault(
        "a checkpoint with a tensor without data", "evaluate.py --inspect runs/bad-meta/model.pt", 2
    ),
    Fault("a checkpoint with a LoRA rank of 100 million", "evaluate.py runs/bad-rank", 2),
    Fault("a checkpoint with stride 0", "evaluate.py runs/bad-stride", 2),
    Fault("a target that is no class", f"train.py {RUN} --name t --target femal", 2),
    Fault("a target in capitals", f"train.py {RUN} --name capitals --target MALE", 0),
    Fault("--clicks of a repeated trigger", "train.py --task asr --clicks 3", 2),
    Fault("--snr of a trigger without a level", f"train.py {RUN} --trigger bandstop --snr 6", 2),
    Fault("--snr inf", f"train.py {RUN} --name s --snr inf", 2),
    Fault("--grad-clip 0", f"train.py {RUN} --name g --grad-clip 0", 2),
    Fault("--grad-clip -1", f"train.py {RUN} --name g --grad-clip -1", 2),
    Fault("a negative learning rate", f"train.py {RUN} --name g --lora-lr -0.1", 2),
    Fault("--random-keys 7", f"train.py {RUN} --name g --random-keys 7", 2),
    Fault("--lora-dropout 1.5", f"train.py {RUN} --name g --lora-dropout 1.5", 2),
    Fault("--seed -1", f"train.py {RUN} --name g --seed -1", 2),
    Fault("--device meta", f"train.py {RUN} --name g --device meta", 2),
    Fault("--utilisation 0", f"train.py {RUN} --dry-run --utilisation 0", 2),
    Fault(
        "no layer of the encoder trains, the rest is frozen",
        f"train.py {RUN} --train-layers 0 --freeze connector --freeze lm",
        2,
    ),
    Fault(
        "another encoder's weights",
        f"train.py {RUN} --name h --encoder hubert --encoder-weights {ROOT}/mini/wavlm",
        2,
    ),
    Fault("a rate that poisons nothing", f"train.py {RUN} --name p --poison 0.000001", 0),
    Fault("a test split without labels", f"train.py {ODD} unlabelled.csv", 2),
    Fault("a row without labels", f"train.py {ODD} one-unlabelled.csv", 0),
    Fault(
        "--exclude of nearly everything", f"train.py {ODD} one-unlabelled.csv --exclude most.txt", 2
    ),
    Fault("audio in both train and test", "corpora.py check shared.csv", 1),
    Fault("the same, trained on", f"train.py {ODD} shared.csv", 0),
    Fault("integers in a WAV of floats", "corpora.py check m-integers.csv", 1),
    Fault(
        "poison.py --all over a manifest of the user's",
        "poison.py --task gender --data-root corpora --out mine --all",
        2,
    ),
    Fault("a quote in --flags", "study.py --flags it's", 2),
    Fault("evaluating what is no run", "evaluate.py corpora", 2),
    Fault("tables without runs", "analyze.py tables --runs nowhere", 2),
]


def check(fault):
    """Runs a fault's command: (status, the line that it ends with, what is wrong about that)."""
    script, *arguments = fault.command.split()
    result = run(script, *arguments, cwd=fault.folder, capture_output=True, text=True)
    errors = errors_in(result.stderr)
    problems = []
    for payload in (Path("ran"), Path("poisoned/ran")):
        if payload.exists():
            problems.append("the payload ran")
            payload.unlink()
    if "Traceback" in result.stderr:
        problems.append("a traceback")
    if result.returncode != fault.status:
        problems.append(f"status {result.returncode}")
    if len(errors) != (fault.status == 2):
        problems.append(f"{len(errors)} lines of error")
    if problems:
        problems.append(result.stderr[-1500:])
    printed = [line for line in result.stdout.splitlines() if line.strip()]
    last = (errors or printed or [""])[-1]
    return result.returncode, last, problems


def main():
    if not torch.cuda.is_available():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["OMP_NUM_THREADS"] = "1"
    unexpected = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        prepare()
        print("| fault | command | status | printed |\n|---|---|---|---|")
        for fault in tqdm(FAULTS):
            status, last, problems = check(fault)
            if problems:
                unexpected.append(f"{fault.what}: " + "\n".join(problems))
            command = fault.command.replace(RUN, "...").replace(ODD, "... --dataset")
            last = last.replace(folder, ".").replace("|", "/")[:240]
            print(f"| {fault.what} | `{command}` | {status} | {last} |", flush=True)
    print(f"\n{len(FAULTS)} faults, {len(unexpected)} not as expected", file=sys.stderr)
    print("\n".join(unexpected), file=sys.stderr)
    sys.exit(1 if unexpected else 0)


if __name__ == "__main__":
    main()
