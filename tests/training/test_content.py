"""What items are: texts, their vectors and the cache, prices."""

import hashlib
import json

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.numpy import load_file

from training import content
from training.content import (
    ContentOptions,
    TextEncoder,
    content_features,
    encoded,
    item_content,
    item_texts,
    price_features,
    principal_components,
    start_vectors,
    text_vectors,
)
from training.data.dataset import ITEM_SCHEMA

NAMES = ("item_id", "title", "description", "category", "brand", "price", "attributes")
ITEMS = pl.DataFrame(
    {
        "item_id": ["a", "b", "c", "d", "e"],
        "title": ["Red shoe", "blue hat", None, " ", "green shoe"],
        "description": [None, "A hat for the sea.", None, None, ""],
        "category": [["wear", "shoes"], None, None, [], ["wear", "shoes"]],
        "brand": ["Alder", None, None, None, "Brim"],
        "price": [10.0, None, 3.0, None, 40.0],
        "attributes": [["leather", "17"], None, ["23"], None, None],
    },
    schema={name: ITEM_SCHEMA[name] for name in NAMES},
)
WORDS = (
    "red",
    "blue",
    "green",
    "shoe",
    "hat",
    "wear",
    "shoes",
    "alder",
    "brim",
    "leather",
    "sea",
    "for",
    ".",
    ">",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return the folder of a tiny text encoder with random weights, as transformers writes one."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("tiny encoder")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizer({word: number for number, word in enumerate(vocabulary)}).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=256,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def test_texts_say_what_the_catalog_says():
    assert item_texts(ITEMS) == [
        "Red shoe. wear > shoes. Alder. leather",
        "blue hat. A hat for the sea.",
        "",
        "",
        "green shoe. wear > shoes. Brim",
    ]
    assert item_texts(ITEMS.select("item_id", "title"))[:3] == ["Red shoe", "blue hat", ""]
    assert item_texts(ITEMS.select("item_id")) == [""] * 5


def test_prices_are_standardised_logarithms():
    features = price_features(ITEMS["price"])
    assert features[0].tolist() == [0, 0]
    assert features[:, 1].tolist() == [0, 0, 1, 0, 1, 0]
    logs = np.log([11.0, 4.0, 41.0])
    np.testing.assert_allclose(features[[1, 3, 5], 0], (logs - logs.mean()) / logs.std(), rtol=1e-5)
    assert features[[2, 4], 0].tolist() == [0, 0]
    assert price_features(pl.Series([5.0, 5.0])).tolist() == [[0, 0], [0, 0], [0, 0]]


def test_a_text_vector_is_the_mean_of_the_last_states(model):
    """By the model itself, one text at a time, so without padding."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, bare = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    texts = [text for text in item_texts(ITEMS) if text] + ["red " * 300]
    found = TextEncoder(str(model)).encode(texts)
    assert (found.shape, found.dtype) == ((4, 8), np.float32)
    for text, vector in zip(texts, found, strict=True):
        with torch.no_grad():
            tokens = tokenizer(text, truncation=True, max_length=128, return_tensors="pt")
            mean = bare(**tokens).last_hidden_state[0].mean(0).numpy()
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=1e-5)
    assert len(TextEncoder(str(model)).encode([])) == 0


def test_a_text_is_encoded_once_ever(model, tmp_path, monkeypatch):
    texts = item_texts(ITEMS)
    first = encoded(texts, TextEncoder(str(model)), tmp_path)
    assert first.shape == (6, 8)
    assert not first[[0, 3, 4]].any()
    asked = []
    real = TextEncoder.encode

    def counting(self, batch):
        asked.extend(batch)
        return real(self, batch)

    monkeypatch.setattr(TextEncoder, "encode", counting)
    # Another order, other items, doubles: what is known is not asked again.
    again = encoded([texts[4], "red hat", texts[0], "red hat"], TextEncoder(str(model)), tmp_path)
    assert asked == ["red hat"]
    np.testing.assert_array_equal(again[[1, 3]], first[[5, 1]])
    np.testing.assert_array_equal(again[2], again[4])
    (folder,) = tmp_path.iterdir()
    files = {file.name: load_file(file) for file in folder.iterdir()}
    assert all(name.endswith(".safetensors") for name in files)
    hashes = {bytes(row) for arrays in files.values() for row in arrays["hashes"]}
    assert hashes == {hashlib.sha256(text.encode()).digest() for text in (*texts, "red hat") if text}
    # Other weights are another encoder, and know nothing of it.
    monkeypatch.setattr(TextEncoder, "identity", lambda self: "other")
    encoded(texts[:1], TextEncoder(str(model)), tmp_path)
    assert asked == ["red hat", texts[0]]


def test_the_identity_follows_the_files(model, tmp_path):
    identity = TextEncoder(str(model)).identity()
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert TextEncoder(str(copy)).identity() == identity
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    assert TextEncoder(str(copy)).identity() != identity


def test_an_encoder_that_cannot_be_had(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"a folder without config.json"):
        TextEncoder(str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=r"content.encoder is 'no-such/model'; expected auto, none, lsa"):
        TextEncoder("no-such/model")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be loaded"):
        TextEncoder(str(tmp_path)).encode(["a"])


def test_principal_components_keep_what_tells_items_apart():
    rng = np.random.default_rng(0)
    vectors = (3 + rng.standard_normal((50, 6)) * [4, 1, 1, 0.1, 0.1, 0]).astype(np.float32)
    vectors[[0, 7]] = 0
    found = principal_components(vectors, 3)
    assert found.shape == (50, 3)
    assert not found[[0, 7]].any()
    filled = vectors.any(axis=1)
    centred = vectors[filled] - vectors[filled].mean(0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(found[filled]), np.abs(left * values)[:, :3], atol=1e-3)
    assert principal_components(vectors, 100).shape == (50, 5)  # the last column is the same everywhere
    assert principal_components(np.zeros((4, 3), np.float32), 2).shape == (4, 1)
    assert principal_components(np.ones((4, 3), np.float32), 2).shape == (4, 1)


@pytest.mark.parametrize("encoder", ["lsa", "model"])
def test_content_is_text_and_price(encoder, model, tmp_path):
    options = ContentOptions(encoder=str(model) if encoder == "model" else encoder, dim=2)
    found = item_content(ITEMS, options, tmp_path)
    num_texts = found.shape[1] - 2
    assert (1 <= num_texts <= 2, found.dtype) == (True, np.float32)
    assert not found[0].any()
    if encoder == "model":  # attributes that are codes are features of lsa, and no text
        assert not found[[3, 4], :num_texts].any()
    prices = price_features(ITEMS["price"])
    prices[4] = 0  # of which nothing at all is known
    np.testing.assert_array_equal(found[:, num_texts:], prices)
    filled = found[:, :num_texts].any(axis=1)
    assert np.square(found[filled, :num_texts]).mean() == pytest.approx(1, rel=1e-5)
    without_prices = item_content(ITEMS.drop("price"), options, tmp_path)
    np.testing.assert_allclose(without_prices, found[:, :num_texts], atol=1e-6)
    similarities = text_vectors(ITEMS, options, tmp_path)
    assert similarities[1] @ similarities[5] > similarities[1] @ similarities[2]


def words_of(title: str) -> list[str]:
    words: list[str] = pl.DataFrame({"title": [title]}).select(content._words("title"))["title"][0].to_list()
    return words


def test_words_of_a_script_without_spaces():
    """A title is no word of its own there: what shares letters in a row is alike."""
    titles = ["无线蓝牙耳机", "蓝牙耳机降噪", "牛皮钱包", "男士牛皮钱包", "Bluetooth-Headset 蓝牙"]
    features = content_features(pl.DataFrame({"item_id": list("abcde"), "title": titles}))
    table = np.zeros((len(features), features.num_columns))
    for row in range(len(features)):
        columns, values = features.row(row)
        table[row, columns] = values
    alike = table[1:] @ table[1:].T
    assert alike[0, 1] > 0.3
    assert alike[2, 3] > 0.3
    assert alike[0, 4] > 0
    assert alike[[0, 1]][:, [2, 3]].max() == 0
    # The mark of a long vowel is a letter like the others.
    assert words_of("コーヒー豆") == ["コー", "ヒー", "豆", "ーヒ", "ー豆"]
    assert words_of("Headset-2 наушники") == ["headset", "2", "наушники"]


def test_nothing_to_tell(tmp_path):
    assert item_content(ITEMS, ContentOptions(encoder="none"), tmp_path) is None
    assert item_content(ITEMS.select("item_id"), ContentOptions(encoder="lsa"), tmp_path) is None
    with pytest.raises(ValueError, match=r"content.dim is 0; expected 1 or more"):
        item_content(ITEMS, ContentOptions(dim=0), tmp_path)


def test_auto_is_the_installed_encoder_or_lsa(model, monkeypatch):
    auto = ContentOptions(encoder="auto")
    monkeypatch.setattr(content, "packaged_encoder", lambda: None)
    assert content.encoder_of(auto) == "lsa"
    assert content.encoder_name(auto) == "lsa"
    monkeypatch.setattr(content, "packaged_encoder", lambda: model)
    assert content.encoder_of(auto) == str(model)
    assert content.encoder_name(auto) == content.PACKAGED_ENCODER
    assert content.encoder_of(ContentOptions(encoder="lsa")) == "lsa"


def test_the_command_writes_what_the_ranker_takes(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    events = {"user_id": ["u"], "item_id": ["a"], "timestamp": [0], "event_type": ["view"]}
    pl.DataFrame(events).write_parquet(data / "events.parquet")
    ITEMS.write_parquet(data / "items.parquet")
    (data / "dataset.json").write_text(json.dumps({"name": "x", "source": {}, "time": "order"}))
    out = tmp_path / "content.safetensors"
    assert content.main([str(data), "--out", str(out), "--encoder", "lsa", "--dim", "3"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert load_file(out)["content_vectors"].shape[0] == 6
    assert content.main([str(data), "--out", str(out), "--encoder", "none"]) == 2
    assert "has nothing to tell" in capsys.readouterr().err


def test_a_start_tells_as_much_in_each_of_its_numbers():
    rng = np.random.default_rng(0)
    content = np.zeros((301, 12), np.float32)
    content[1:] = rng.normal(size=(300, 12)) * np.arange(1, 13) + 5.0  # of unlike spread, off the middle
    content[[3, 9]] = 0  # of these nothing is known
    start = start_vectors(content, 8)
    assert start.shape == (301, 8)
    known = start[content.any(axis=1)]
    np.testing.assert_allclose(known.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(known.T @ known / len(known), np.eye(8) / 8, atol=1e-5)
    assert not start[[0, 3, 9]].any()
    # They are the leading components: what differs most between items is not lost.
    wide = content[content.any(axis=1)][:, -1]
    assert np.linalg.lstsq(known, wide - wide.mean())[1][0] < 0.02 * np.square(wide - wide.mean()).sum()


def test_a_start_from_less_than_an_embedding_holds():
    content = np.zeros((5, 3), np.float32)
    content[1:, 0] = [1, 2, 3, 4]
    start = start_vectors(content, 4)
    np.testing.assert_allclose(np.square(start[1:, 0]).mean(), 1 / 4, rtol=1e-5)
    assert not start[:, 1:].any()
    assert not start_vectors(np.zeros((5, 3), np.float32), 4).any()


def test_a_rare_feature_makes_no_start_long():
    content = np.zeros((1001, 2), np.float32)
    content[1:, 0] = np.random.default_rng(0).normal(size=1000)
    content[7, 1] = 1.0
    lengths = np.linalg.norm(start_vectors(content, 4), axis=1)
    assert lengths[7] == pytest.approx(2.0)
    assert np.delete(lengths, 7).max() < 2.0


def test_of_an_item_without_text_and_price_nothing_is_known(tmp_path):
    items = pl.DataFrame(
        {
            "item_id": list("abcd"),
            "title": ["red hat", "blue hat", None, None],
            "price": [1.0, None, None, 3.0],
        }
    )
    vectors = item_content(items, ContentOptions(encoder="lsa"), tmp_path)
    assert vectors is not None
    assert vectors.any(axis=1).tolist() == [False, True, True, False, True]
