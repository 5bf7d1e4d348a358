import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest  # noqa: E402
import torch  # noqa: E402

import mini  # noqa: E402

SHARED = ROOT.parent / "shared"
TINY = {"libri": {"train-clean-360": (4, 12), "dev-clean": (2, 4), "test-clean": (2, 6)},
        "crema": {"actors": 20, "takes": 1}, "vox": {"dev": (10, 2, 2), "test": (4, 1, 2)}}


@pytest.fixture(scope="session")
def corpora(tmp_path_factory):
    """The three mini corpora, a few dozen utterances each."""
    root = tmp_path_factory.mktemp("corpora")
    for corpus in TINY:
        mini.make_corpus(corpus, root, TINY[corpus])
    return root


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
