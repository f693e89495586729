"""The public files that tests and benchmarks want: fetched, checked, and what is missing said.

    python benchmarks/assets.py --to ../assets                     all of it, about 200 MB
    python benchmarks/assets.py --to ../assets --only weights      the part whose path begins so
    python benchmarks/assets.py --to ../assets --check             fetches nothing
    MINIFT_ASSETS=../assets pytest

Every file is known by its size and SHA-256 (of a .gz: of what is in it, as gzip's own bytes vary by version). What
arrives and is not that file is thrown away; one that is already there is reported and left alone. Some files are made
from what was published: `make` in their group says how. Licences differ, research use for some: read them first.
Exit code 1 where a file is missing or differs, other than those that no public address is known of.
"""

import argparse
import base64
import gzip
import hashlib
import io
import json
import os
import struct
import sys
import tarfile
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

# ---- how a file is made of what its address gives: (downloaded, its name) -> the file's bytes


def unchanged(downloaded: bytes, name: str) -> bytes:
    return downloaded


def unzipped(inner: str) -> Callable[[bytes, str], bytes]:
    """The member `inner` of a zip file, a pattern with {name}."""

    def make(downloaded: bytes, name: str) -> bytes:
        with zipfile.ZipFile(io.BytesIO(downloaded)) as archive:
            return archive.read(inner.format(name=name))

    return make


def members(downloaded: bytes, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Path -> bytes of the files in a compressed tar file whose path is wanted."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(downloaded)) as archive:
        for member in archive:
            if member.isfile() and wanted(member.name):
                found[member.name] = archive.extractfile(member).read()
    return found


def untarred(inner: str) -> Callable[[bytes, str], bytes]:
    """The member `inner` of a tar file, a pattern with {name}."""

    def make(downloaded: bytes, name: str) -> bytes:
        (content,) = members(downloaded, lambda path: path == inner.format(name=name)).values()
        return content

    return make


def json_lines(rows: list[dict], ascii_only: bool) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows).encode()


def imdb_lines(downloaded: bytes, name: str) -> bytes:
    """One half of the reviews as JSON lines: the negative ones first, each kind by its number."""
    split = name.partition(".")[0]
    rows = []
    for label, kind in enumerate(("neg", "pos")):
        folder = f"aclImdb/{split}/{kind}/"
        reviews = members(downloaded, lambda path, folder=folder: path.startswith(folder))
        for path in sorted(reviews, key=lambda path: int(path.rpartition("/")[2].partition("_")[0])):
            number = path.rpartition("/")[2].removesuffix(".txt")
            rows.append({"id": f"{split}/{kind}/{number}", "label": label, "text": reviews[path].decode()})
    return gzip.compress(json_lines(rows, ascii_only=False), mtime=0)


def webnlg_lines(downloaded: bytes, name: str) -> bytes:
    """A split of the English corpus: triples as prompt, each of its texts as completion, in the order of the paths."""
    folder = f"/data/v1.6/en/{name.removesuffix('.jsonl')}/"
    files = members(downloaded, lambda path: folder in path and path.endswith(".xml"))
    rows = []
    for path in sorted(files):
        for entry in ElementTree.fromstring(files[path]).iter("entry"):
            triples = [triple.text.replace("_", " ") for triple in entry.find("modifiedtripleset").iter("mtriple")]
            texts = [(text.text or "").strip() for text in entry.iterfind("lex/text")]
            rows += [{"prompt": " ; ".join(triples) + " ->", "completion": f" {text}"} for text in texts if text]
    return json_lines(rows, ascii_only=False)


def chat_lines(downloaded: bytes, name: str) -> bytes:
    """Instructions with their input and output as chats."""
    rows = []
    for row in json.loads(downloaded):
        asked = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
        said = [("system", "You are a helpful assistant."), ("user", asked), ("assistant", row["output"])]
        rows.append({"messages": [{"role": role, "content": content} for role, content in said]})
    return json_lines(rows, ascii_only=False)


def nano_config(downloaded: bytes, name: str) -> bytes:
    """The published sizes as GPT-2's config.json. The head has weights of its own."""
    sizes = json.loads(downloaded)["config"]
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": sizes["vocab_size"],
        "n_positions": sizes["block_size"],
        "n_embd": sizes["n_embd"],
        "n_layer": sizes["n_layer"],
        "n_head": sizes["n_head"],
        "n_inner": None,
        "resid_pdrop": sizes["resid_pdrop"],
        "embd_pdrop": sizes["embd_pdrop"],
        "attn_pdrop": sizes["attn_pdrop"],
        "layer_norm_epsilon": 1e-05,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    return json.dumps(config, indent=1).encode()


def nano_weights(downloaded: bytes, name: str) -> bytes:
    """The published tensors, base64 in JSON, as GPT-2's model.safetensors; Conv1D keeps its weights as (in, out)."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for key, tensor in json.loads(downloaded).items():
        if key == "config" or key.endswith(".attn.bias"):  # that is the causal mask
            continue
        values = np.frombuffer(base64.b64decode(tensor["data"]), "<f4").reshape(tensor["shape"])
        if key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            values = values.T
        span = [len(data), len(data) + values.nbytes]
        header[key] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": span}
        data += values.tobytes()
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # the tensors begin at a multiple of 8
    return struct.pack("<Q", len(head)) + head + data


# ---- what is wanted


@dataclass(frozen=True)
class Group:
    """Files of one folder and one origin."""

    folder: str
    address: str  # of each file, a pattern with {name}, or of all; "" if no public one is known
    licence: str
    files: dict[str, tuple[int, str]]  # name -> (bytes, SHA-256)
    make: Callable[[bytes, str], bytes] = unchanged


HUB, GITHUB = "https://huggingface.co", "https://raw.githubusercontent.com"
MINILM = f"{HUB}/sentence-transformers/all-MiniLM-L6-v2/resolve/main/{{name}}"
NANO = f"{GITHUB}/bbycroft/llm-viz/9da93742382f1bf36c020c38a1ace454e82c4490/public"
UNCASED = {  # MiniLM's tokenizer is BERT's
    "special_tokens_map.json": (112, "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"),
    "tokenizer.json": (466247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
    "tokenizer_config.json": (350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
    "vocab.txt": (231508, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
}
MINILM_FILES = UNCASED | {
    "config.json": (612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
    "model.safetensors": (90868376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
}
GPT2_FILES = {
    "merges.txt": (456318, "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
    "tokenizer.json": (1355256, "8414cab924d8b9b33013f0d221c5862f365ee9be39c5c2bfae8a5a9e970478a6"),
    "vocab.json": (1042301, "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
}
NANO_FILES = {
    "gpt-nano-sort-model.json": (466124, "a38d5f450e0c808305973c587cdd389ca4de92bbf60fa6a4482bf9a03f0a6051"),
    "gpt-nano-sort-t0-partials.json": (247846, "642b29b966fc4d90e4672a54c7cfda72b5249427b2b1561c83cd536b857195e9"),
}
NANO_CONFIG = {"config.json": (354, "10c90373177e5e65fb41be1320d1b6f43d6d9d1da59453015bbfda31c5785b90")}
NANO_WEIGHTS = {"model.safetensors": (347088, "c3465dbdab767b15ada8886ce1aac4f89a91f4a3a7a30d97b446eb17141b5c6f")}
ADAPTERS = {
    "bert-seqcls/adapter_config.json": (848, "4b0a1eb56f94ebef26a9f8116cf5d6221f0d2da7d24b045fb38929cd9e24d5c3"),
    "bert-seqcls/adapter_model.safetensors": (
        1192672,
        "19cd2ab6ca11de8c7cd9b25d44f2fbb793a418acadbf5bd7f76a160999fd473d",
    ),
    "gpt2-causal-lm/adapter_config.json": (837, "488f697f22ff12568c5d37ad3a8432e7cbc1cc7d13be4559a326c794a829581f"),
    "gpt2-causal-lm/adapter_model.safetensors": (
        3253104,
        "130792c9a7496b3758e7a1e049ca51698a5776e59e1fc2911ff6c9d8ebd3fa05",
    ),
    "gpt2-seqcls/adapter_config.json": (610, "8111748aeaf2927fa4065a06c30ead8c8a9211a20f2cdb22dfcc1ce60396eca1"),
    "gpt2-seqcls/adapter_model.safetensors": (
        1201208,
        "658bf57ed30d22120177cda107e513c0712db1b4324528cc4f65cdf562248e3e",
    ),
}
SST2 = {
    "train.tsv": (720259, "ec192f833a64da08f475488a77b0d0b47db47acd0f458bd18433fc793b569920"),
    "dev.tsv": (92057, "eddea6b39e601dd4e7a672b53cc40fdf6019fa80522f351206c24340ca5d9359"),
    "test.tsv": (188749, "831169c7e2e429d6026e1bdbb542f33b636e3e596caad9602ebc953c205928b7"),
}
IMDB = {
    "train.jsonl.gz": (34481238, "287b7101c3d2e455667f6e25a62419924f8134dcf4f448c4fe3175d79b1a7541"),
    "test.jsonl.gz": (33674569, "33868f877174e885589772a27cc595f16067ca42ce339740e05662c818bfa5b8"),
}
POLARITY = {
    "rt-polarity.neg": (612256, "4ace77d558c3714723843f1d65b60c01e3417b208180f0728808d76ad0eeeaca"),
    "rt-polarity.pos": (626139, "2da124ec187a9d5a29c9f04e91c540e02baed5af8868f550a26bd6fd4dbf8bf0"),
}
SMS = {"SMSSpamCollection.tsv": (477907, "7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d")}
RTE = {
    "train.tsv": (846227, "81d25e323e1ab5b2ad7cd445f1a69db89f2b1c104f3e26915a9421aa4a5f4735"),
    "dev.tsv": (90343, "80230dfa1347282e7b532b06a1004a76a710087541189bf874223ddf0e3819fb"),
    "test.tsv": (933969, "6e33f09b5c2bfd5fd5fde217070f3dd49e484e33b9752b5864cf36fc421a213f"),
}
WEBNLG = {
    "train.jsonl": (5506678, "7c85041ad6d295a730288947b365f01d53d059d20a83f49f52164e796d2e4b9c"),
    "dev.jsonl": (701425, "32a660583d11879befd29d3febd981c13772fef32b7a31c97fad7586ab75a364"),
    "test.jsonl": (1459743, "5ee0cda4ed4e73bce57fb8a33ef5b90c2ff2f917ccc6fb83d224b15bd829b82e"),
}
CHATS = {"instructions.messages.jsonl": (278136, "9121102ddd1a18bace8cb84cde78eec20e451f8a4ca7357b3abdb3a7314c7fc4")}
TOY_CHAT = {"toy_chat_fine_tuning.jsonl": (27385, "2af82e94fad9824b7f95202b60927cde71f734106c7df904d524e49bf6770818")}
SHAKESPEARE = {"input.txt": (1115394, "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")}
WIKITEXT = {"valid.txt": (1121681, "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8")}

GROUPS = [
    Group("weights/all-MiniLM-L6-v2", MINILM, "Apache-2.0", MINILM_FILES),
    Group("weights/tokenizers/bert-base-uncased", MINILM, "Apache-2.0", UNCASED),
    Group("weights/tokenizers/gpt2", f"{HUB}/openai-community/gpt2/resolve/main/{{name}}", "MIT", GPT2_FILES),
    Group("weights/gpt-nano-sort", f"{NANO}/{{name}}", "MIT", NANO_FILES),
    Group("weights/gpt-nano-sort/hf", f"{NANO}/gpt-nano-sort-model.json", "MIT", NANO_CONFIG, nano_config),
    Group("weights/gpt-nano-sort/hf", f"{NANO}/gpt-nano-sort-model.json", "MIT", NANO_WEIGHTS, nano_weights),
    # adapters that strangers published on the hub; under which names was not written down
    Group("weights/peft-adapters", "", "unknown", ADAPTERS),
    Group(
        "data/imdb",
        "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
        "none stated, research use (Maas et al. 2011)",
        IMDB,
        imdb_lines,
    ),
    Group(
        "data/sst2-sentences",
        f"{GITHUB}/clairett/pytorch-sentiment-classification/457ffd83de90a9d6d472d8ffc31bbffe40a8b236/data/SST2/{{name}}",
        "research use (Socher et al. 2013)",
        SST2,
    ),
    Group(
        "data/rt-polarity",
        f"{GITHUB}/yoonkim/CNN_sentence/23e0e1f7355705bb083043fda05c031b15acb38c/{{name}}",
        "research use (Pang and Lee 2005)",
        POLARITY,
    ),
    Group(
        "data/sms-spam",
        "https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip",
        "CC BY 4.0",
        SMS,
        unzipped("SMSSpamCollection"),
    ),
    Group(
        "data/glue-rte",
        "https://dl.fbaipublicfiles.com/glue/data/RTE.zip",
        "research use (GLUE, Wang et al. 2018)",
        RTE,
        unzipped("RTE/{name}"),
    ),
    Group(
        "data/webnlg",
        "https://codeload.github.com/ThiagoCF05/webnlg/tar.gz/711a8ca37eff2d694d664edcaeb07b0ccf8f56c2",
        "CC BY-NC-SA 4.0",
        WEBNLG,
        webnlg_lines,
    ),
    Group(
        "data/instruct",
        f"{GITHUB}/rasbt/LLMs-from-scratch/28c65cdfbc3338e2e040016eea4b7fdf556e4d57/"
        "ch07/01_main-chapter-code/instruction-data.json",
        "Apache-2.0",
        CHATS,
        chat_lines,
    ),
    Group(
        "data/openai-chat",
        f"{GITHUB}/openai/openai-cookbook/9172b0ff4f1cca4af09c3375c0417625f3949ad1/examples/data/{{name}}",
        "MIT",
        TOY_CHAT,
    ),
    Group(
        "data/tinyshakespeare",
        f"{GITHUB}/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/{{name}}",
        "public domain",
        SHAKESPEARE,
    ),
    Group(
        "data/wikitext2",
        f"{GITHUB}/pytorch/examples/77f55b912142e11fcfdf5b530231fb9c52f181e8/"
        "word_language_model/data/wikitext-2/{name}",
        "CC BY-SA",
        WIKITEXT,
    ),
]

# ---- fetching and checking


def fault(content: bytes, name: str, size: int, digest: str) -> str:
    """What is wrong with a file's bytes; "" if they are the known ones."""
    if name.endswith(".gz"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError) as error:
            return f"is no whole gzip file ({error})"
    if len(content) != size:
        return f"has {len(content):,} bytes, expected {size:,}"
    found = hashlib.sha256(content).hexdigest()
    return "" if found == digest else f"has SHA-256 {found}, expected {digest}"


@cache  # an archive is read once for all that is made of it
def download(address: str) -> bytes:
    print(f"fetching {address}", file=sys.stderr)
    with urllib.request.urlopen(address, timeout=60) as answer:
        return answer.read()


def fetch(group: Group, name: str, path: Path) -> str:
    """Writes a file that is missing; returns what went wrong, else ""."""
    address = group.address.format(name=name)
    try:
        content = group.make(download(address), name)
    except Exception as error:  # of the network, or of an archive that is another than it was
        return f"could not be made of {address}: {error!r}"
    if wrong := fault(content, name, *group.files[name]):
        return f"as {address} has it today is another: it {wrong}"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")  # a fetch that is stopped leaves no half file under the name
    partial.write_bytes(content)
    os.replace(partial, path)
    return ""


def report(groups: list[Group], folder: Path, only: str, fetching: bool) -> list[str]:
    """Fetches what is missing, if told to, and prints a line for each file that is not right.

    Returns the paths that are not right, without those that no public address is known of.
    """
    wrong = []
    for group in groups:
        for name, (size, digest) in group.files.items():
            relative, path = f"{group.folder}/{name}", folder / group.folder / name
            if not relative.startswith(only):
                continue
            if path.is_file():
                problem = fault(path.read_bytes(), name, size, digest)
            elif not group.address:
                print(f"{relative} is missing: no public address is known; the tests that want it skip")
                continue
            elif fetching:
                problem = fetch(group, name, path)
            else:
                problem = f"is missing: {group.address.format(name=name)} (licence: {group.licence})"
            if problem:
                print(f"{relative} {problem}")
                wrong.append(relative)
    return wrong


def main(arguments: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--to", type=Path, required=True, help="the folder for weights/ and data/: MINIFT_ASSETS, --assets")
    p.add_argument("--only", default="", help="the beginning of the paths that are wanted, as data/imdb")
    p.add_argument("--check", action="store_true", help="fetch nothing; say what is missing and where it is")
    a = p.parse_args(arguments)
    wrong = report(GROUPS, a.to, a.only, not a.check)
    print(f"{len(wrong)} files are missing or differ" if wrong else f"{a.to}: everything that can be had is there")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
