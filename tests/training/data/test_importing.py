"""`trirank import`: the rules that hold for every format, and each format on a tiny source."""

import csv
import gzip
import io
import json
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training.data.dataset import Dataset
from training.data.importing import main, time_unit_of

HEADER = "user_id,item_id,timestamp,event_type,price\n"
GOOD = "u1,i1,2024-01-01 00:00:00 UTC,view,1.50\n"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_bytes(text.encode())
    return path


def load(out: Path) -> tuple[Dataset, list[dict], list[dict]]:
    dataset = Dataset.open(out)
    return dataset, dataset.events.collect().to_dicts(), dataset.items.collect().to_dicts()


def import_table(tmp_path: Path, text: str, *options: str, name: str = "log.csv") -> Path:
    out = tmp_path / "out"
    assert main(["table", str(write(tmp_path / name, text)), "--out", str(out), *options]) == 0
    return out


def reasons(out: Path) -> list[tuple[str, int]]:
    return pl.read_parquet(out / "rejected.parquet").select("reason", "row").rows()


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_s3rec(tmp_path, ending):
    write(tmp_path / f"Shop.txt{ending}", "17 3 1\n\n007 1\n")
    write(
        tmp_path / f"Shop_items.jsonl{ending}",
        '{"item": 1, "asin": "A", "title": "One", "categories": [["a", "b"], ["c"]]}\n'
        '{"item": 2, "title": "Two", "categories": []}\n',
    )
    write(tmp_path / f"Shop_item2attributes.json{ending}", '{"1": [5, 6], "9": [1]}')
    out = tmp_path / "out"
    assert main(["s3rec", str(tmp_path / "Shop"), "--out", str(out)]) == 0
    dataset, events, items = load(out)
    assert (dataset.info.name, dataset.info.time) == ("Shop", "order")
    assert [tuple(e.values()) for e in events] == [
        ("17", "3", 0, "interaction"),
        ("17", "1", 1, "interaction"),
        ("007", "1", 0, "interaction"),
    ]
    assert items == [
        {"item_id": "1", "title": "One", "category": ["a", "b"], "attributes": ["5", "6"]},
        {"item_id": "2", "title": "Two", "category": None, "attributes": None},
        {"item_id": "3", "title": None, "category": None, "attributes": None},
    ]


def test_s3rec_needs_only_the_log(tmp_path):
    write(tmp_path / "Shop.txt", "1 2 3\n")
    assert main(["s3rec", str(tmp_path / "Shop.txt"), "--out", str(tmp_path / "out")]) == 0
    assert load(tmp_path / "out")[2] == [{"item_id": "2"}, {"item_id": "3"}]


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_lightgcn(tmp_path, ending):
    source = tmp_path / "graph"
    write(source / f"train.txt{ending}", "0 1 2\n1 2\n")
    write(source / f"test.txt{ending}", "0 3\n1 \n")
    out = tmp_path / "out"
    assert main(["lightgcn", str(source), "--out", str(out), "--max_rejected", "0.2"]) == 0
    dataset, events, _ = load(out)
    assert (dataset.info.name, dataset.info.time, dataset.info.split) == ("graph", "none", "given")
    assert [(e["user_id"], e["item_id"], e["timestamp"], e["split"]) for e in events] == [
        ("0", "1", 0, "train"),
        ("0", "2", 0, "train"),
        ("1", "2", 0, "train"),
        ("0", "3", 0, "test"),
    ]
    assert reasons(out) == [("missing item_id", 5)]  # user 1 has no test items


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_pairs_with_items(tmp_path, ending):
    log = write(tmp_path / f"log.txt{ending}", "7 a\r\n8\tb\n\n7   b\n7 b c\n")
    items = write(tmp_path / "items.tsv", 'item_id\ttitle\tgenres\nb\t"B" is 5" long\tX|Y\nz\tZ\t\n')
    out = tmp_path / "out"
    options = ["--items", str(items), "--max_rejected", "0.5"]
    assert main(["pairs", str(log), "--out", str(out), *options]) == 0
    _, events, rows = load(out)
    assert [(e["user_id"], e["item_id"], e["timestamp"]) for e in events] == [
        ("7", "a", 0),
        ("8", "b", 0),
        ("7", "b", 1),
    ]
    assert rows == [
        {"item_id": "b", "title": '"B" is 5" long', "category": ["X"], "attributes": ["X", "Y"]},
        {"item_id": "z", "title": "Z", "category": None, "attributes": None},
        {"item_id": "a", "title": None, "category": None, "attributes": None},
    ]
    assert pl.read_parquet(out / "rejected.parquet").to_dicts() == [
        {"reason": "wrong number of fields", "row": 4, "line": "7 b c", "user_id": None, "item_id": None}
    ]


def test_pairs_says_which_files_a_folder_has(tmp_path, capsys):
    write(tmp_path / "source" / "a.txt", "1 2\n")
    assert main(["pairs", str(tmp_path / "source"), "--out", str(tmp_path / "out")]) == 2
    assert "a.txt" in capsys.readouterr().err


def test_recbole(tmp_path):
    source = tmp_path / "ml"
    write(
        source / "ml.inter",
        "user_id:token\titem_id:token\trating:float\ttimestamp:float\n01\ta\t3\t881250949\n02\tb\t4.5\t881250949.25\n",
    )
    write(source / "ml.item", "item_id:token\tmovie_title:token_seq\tclass:token_seq\na\tToy Story\tX Y\n")
    assert main(["recbole", str(source), "--out", str(tmp_path / "out")]) == 0
    dataset, events, items = load(tmp_path / "out")
    assert dataset.info.time == "unix"
    assert [tuple(e.values()) for e in events] == [
        ("01", "a", 881250949000, "interaction", 3.0),
        ("02", "b", 881250949250, "interaction", 4.5),
    ]
    assert items[0] == {"item_id": "a", "title": "Toy Story", "category": ["X"], "attributes": ["X", "Y"]}


def test_recbole_without_timestamps_keeps_the_order(tmp_path):
    log = write(tmp_path / "x.inter", "user_id:token\titem_id:token\n1\ta\n1\tb\n")
    assert main(["recbole", str(log), "--out", str(tmp_path / "out")]) == 0
    dataset, events, _ = load(tmp_path / "out")
    assert dataset.info.time == "order"
    assert [e["timestamp"] for e in events] == [0, 1]


TABLE = (
    "when,kind,product,cat,brand,price,who\n"
    "2024-01-01 00:00:01 UTC,buy,007,a.b,,2.0,Ann B\n"
    '2024-01-01T00:00:02Z,view,007,,"Foo, Inc.",1.5,Ann B\n'
    "2024-01-01 02:00:03+02:00,view,8,a,,,😀\n"
)
TABLE_OPTIONS = [
    "--columns.user_id=who",
    "--columns.item_id=product",
    "--columns.timestamp=when",
    "--columns.event_type=kind",
    "--columns.category=cat",
    '--event_types={"buy": "purchase"}',
]


@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz", "log.tsv", "log.parquet"])
def test_table(tmp_path, name):
    out = tmp_path / "out"
    path = tmp_path / name
    if name.endswith(".parquet"):
        pl.read_csv(TABLE.encode(), infer_schema=False).with_columns(
            pl.col("price").cast(float)
        ).write_parquet(path)
    elif name.endswith(".tsv"):
        pl.read_csv(TABLE.encode(), infer_schema=False).write_csv(path, separator="\t")
    else:
        write(path, TABLE)
    assert main(["table", str(path), "--out", str(out), "--repeats", *TABLE_OPTIONS]) == 0
    dataset, events, items = load(out)
    assert dataset.info.repeats
    assert dataset.info.event_types == {"view": 2, "purchase": 1}
    start = 1704067200000
    assert [tuple(e.values()) for e in events] == [
        ("Ann B", "007", start + 1000, "purchase", 2.0),
        ("Ann B", "007", start + 2000, "view", 1.5),
        ("😀", "8", start + 3000, "view", None),
    ]
    # The last known fact of an item wins: a blank one does not take it away.
    assert items == [
        {"item_id": "007", "category": ["a", "b"], "brand": "Foo, Inc.", "price": 1.5},
        {"item_id": "8", "category": ["a"], "brand": None, "price": None},
    ]


def test_table_takes_native_parquet_types(tmp_path):
    frame = pl.DataFrame(
        {
            "user_id": [1, 2],
            "item_id": ["a", "b"],
            "timestamp": [datetime(2024, 1, 1, 0, 0, 1), datetime(2024, 1, 1)],
            "category": [["x", "y.z"], []],
        }
    )
    frame.write_parquet(tmp_path / "log.parquet")
    assert main(["table", str(tmp_path / "log.parquet"), "--out", str(tmp_path / "out")]) == 0
    _, events, items = load(tmp_path / "out")
    assert [(e["user_id"], e["timestamp"]) for e in events] == [("1", 1704067201000), ("2", 1704067200000)]
    assert [i["category"] for i in items] == [["x", "y.z"], None]


def test_table_of_several_files_with_items(tmp_path):
    write(tmp_path / "p2.csv", "item_id,user_id\nb,1\n")
    write(tmp_path / "p1.csv", "user_id,item_id\n1,a\n")
    items = write(
        tmp_path / "items.csv",
        "id,price,margin,available_from\nb,3,0.5,2024-01-01\nb,nan,7,\n,1,,\nc,-1,,\nd,1\n",
    )
    out = tmp_path / "out"
    options = ["--items", str(items), "--item_columns.item_id", "id", "--max_rejected", "0.2"]
    assert main(["table", str(tmp_path / "p*.csv"), "--out", str(out), *options]) == 0
    _, events, rows = load(out)
    assert [(e["user_id"], e["item_id"], e["timestamp"]) for e in events] == [("1", "a", 0), ("1", "b", 1)]
    assert [(r["item_id"], r["price"], r["margin"]) for r in rows] == [
        ("b", None, None),
        ("c", None, None),
        ("a", None, None),
    ]


def test_what_the_item_table_says_of_sales_and_stock(tmp_path, capsys):
    items = write(
        tmp_path / "items.csv",
        "item_id,available_from,available_until,stock\na,2024-01-01,2024-02-01,3\nb,,2024-01-02,0\nc,,,-1\n",
    )
    import_table(tmp_path, "user_id,item_id,timestamp\n1,a,1704067200\n", "--items", str(items))
    _, _, rows = load(tmp_path / "out")
    assert [(r["available_from"], r["available_until"], r["stock"]) for r in rows] == [
        (1704067200000, 1706745600000, 3),
        (None, 1704153600000, 0),
        (None, None, None),
    ]
    assert "1 values of stock in the item table cannot be used" in capsys.readouterr().err


def test_what_is_said_of_the_moment(tmp_path, capsys):
    log = "user_id,item_id,device,basket\n1,a,phone,3.5\n1,b,,-2\n2,a,desktop,many\n"
    path = write(tmp_path / "log.csv", log)
    context = ["--context", '{"device": "categorical", "basket": "numeric"}']
    items = write(tmp_path / "items.csv", "item_id,title,description\na,Shoe,Runs fast\n")
    out = tmp_path / "out"
    assert main(["table", str(path), "--out", str(out), "--items", str(items), *context]) == 0
    dataset, events, rows = load(out)
    assert dataset.info.context == {"device": "categorical", "basket": "numeric"}
    assert [(e["device"], e["basket"]) for e in events] == [("phone", 3.5), (None, -2.0), ("desktop", None)]
    assert rows[0]["description"] == "Runs fast"
    for wrong, message in (
        ('{"devise": "categorical"}', "no column 'devise' for --context.devise \\(did you mean 'device'"),
        (
            '{"price": "numeric"}',
            "context names 'price'; expected a column that is no other part of an event",
        ),
    ):
        assert main(["table", str(path), "--out", str(tmp_path / "no"), "--context", wrong]) == 2
        assert re.search(message, capsys.readouterr().err)


def test_what_is_dropped_from_the_item_table_is_counted(tmp_path, capsys):
    items = write(tmp_path / "items.csv", "item_id,price\nb,3\nb,nan\n,1\nc,-1\nd\n")
    import_table(tmp_path, "user_id,item_id\n1,a\n", "--items", str(items), "--max_rejected", "0.2")
    err = capsys.readouterr().err
    for line in (
        "1 rows of the item table dropped: wrong number of fields",
        "1 rows of the item table dropped: missing item_id",
        "1 rows of the item table dropped: the item stands again below",
        "2 values of price in the item table cannot be used",
        "1 items of the events are not in the item table",
    ):
        assert line in err


def test_an_item_table_that_falls_apart_is_an_error(tmp_path, capsys):
    items = write(tmp_path / "items.csv", 'item_id,title\nb,"two\nlines"\nc,one\n')
    log = write(tmp_path / "log.csv", "user_id,item_id\n1,a\n")
    out = tmp_path / "out"
    assert main(["table", str(log), "--out", str(out), "--items", str(items)]) == 2
    assert "2 of 3 rows of the item table have a wrong number of fields" in capsys.readouterr().err
    assert not out.exists()


def test_attributes_of_the_item_table(tmp_path):
    items = write(tmp_path / "items.csv", "item_id,facts\na,red;;cotton\nb,\n")
    options = ["--items", str(items), "--item_columns.attributes", "facts", "--attribute_separator", ";"]
    out = import_table(tmp_path, "user_id,item_id\n1,a\n", *options)
    assert [(item["item_id"], item["attributes"]) for item in load(out)[2]] == [
        ("a", ["red", "cotton"]),
        ("b", None),
    ]


def test_event_types_that_are_not_known_are_named(tmp_path, capsys):
    text = "user_id,item_id,event_type\n" + "u,a,view\n" * 8 + "u,a,order\n" * 2
    assert main(["table", str(write(tmp_path / "log.csv", text)), "--out", str(tmp_path / "no")]) == 2
    assert "more than max_rejected 1.0%: unknown event_type (2)" in (said := capsys.readouterr().err)
    assert "event types that are not known: 'order' (2); say which of interaction, view, " in said
    import_table(tmp_path, text, "--max_rejected", "0.2")
    assert (
        "event types that are not known: 'order' (2); say which of interaction, view, "
        in capsys.readouterr().err
    )


def test_events_of_days_to_come_are_counted(tmp_path, capsys):
    import_table(tmp_path, "user_id,item_id,timestamp\nu,a,2024-01-01\nu,b,2990-01-01\n")
    assert "1 events are of days to come" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("unit", "text", "expected"),
    [
        ("auto", "1704067200", 1704067200000),
        ("auto", "1704067200.5", 1704067200500),
        ("auto", "1704067200000", 1704067200000),
        ("auto", "1704067200000000", 1704067200000),
        ("auto", "2024-01-01", 1704067200000),
        ("auto", "2024-01-01 00:00", 1704067200000),
        ("auto", "2024-01-01T01:00:00.123+01:00", 1704067200123),
        ("s", "0", 0),
        ("ms", "-5", -5),
    ],
)
def test_times(tmp_path, unit, text, expected):
    out = import_table(tmp_path, f"user_id,item_id,timestamp\nu,i,{text}\n", "--time_unit", unit)
    assert load(out)[1][0]["timestamp"] == expected


def test_a_time_unit_that_is_not_clear_is_not_guessed():
    with pytest.raises(ValueError, match="time_unit"):
        time_unit_of(pl.Series(["20240101", "20240102"]))


# --- bad rows -------------------------------------------------------------------------------------

BAD = {
    ",i1,2024-01-01,view,1\n": "missing user_id",
    "   ,i1,2024-01-01,view,1\n": "missing user_id",
    "u1,\u3000,2024-01-01,view,1\n": "missing item_id",
    "u1,i1,,view,1\n": "unreadable timestamp",
    "u1,i1,2024-02-30,view,1\n": "unreadable timestamp",
    "u1,i1,2024-01-01,stare,1\n": "unknown event_type",
    "u1,i1,2024-01-01,,1\n": "unknown event_type",
    "u1,i1,2024-01-01,view\n": "wrong number of fields",
    "u1,i1,2024-01-01,view,1,\n": "wrong number of fields",
    'u1,i1,2024-01-01,view,"1\n': "wrong number of fields",
    '"u1"x,i1,2024-01-01,view,1\n': "wrong number of fields",
}


@pytest.mark.parametrize(("line", "reason"), BAD.items())
def test_a_bad_row_is_kept_with_its_reason(tmp_path, line, reason):
    out = import_table(tmp_path, HEADER + GOOD + line + GOOD, "--max_rejected", "0.5")
    dataset, events, _ = load(out)
    assert len(events) == 2
    assert dataset.info.rejected_reasons == {reason: 1}
    rejected = pl.read_parquet(out / "rejected.parquet")
    assert rejected.columns[:3] == ["reason", "row", "line"]
    assert rejected.row(0)[:3] == (reason, 2, line.rstrip("\n"))


def test_blank_optional_fields_are_no_fault(tmp_path):
    out = import_table(tmp_path, "user_id,item_id,price,rating,session_id\nu,i,,\t, \n")
    assert not (out / "rejected.parquet").exists()
    assert load(out)[1][0] | {"timestamp": 0} == {
        "user_id": "u",
        "item_id": "i",
        "timestamp": 0,
        "event_type": "interaction",
        "session_id": None,
        "price": None,
        "rating": None,
    }


def test_numbers_that_nothing_hangs_on_are_left_out_and_counted(tmp_path, capsys):
    text = (
        "user_id,item_id,rating,basket,price\nu,a,4.5,2,1\nu,b,good,many,$1\nu,c,,lots,-1\nu,d,bad,,nan\n"
        ",e,bad,many,inf\n"
    )
    out = import_table(tmp_path, text, "--max_rejected", "0.2", "--context", '{"basket": "numeric"}')
    assert [(e["rating"], e["basket"], e["price"]) for e in load(out)[1]] == [
        (4.5, 2, 1),
        (None, None, None),
        (None, None, None),
        (None, None, None),
    ]
    assert reasons(out) == [("missing user_id", 5)]
    shown = capsys.readouterr().err
    assert "2 values of rating in the events cannot be used; left out" in shown
    assert "2 values of basket in the events cannot be used; left out" in shown
    assert "3 values of price in the events cannot be used; left out" in shown


@pytest.mark.parametrize("first", ["user_id,item_id", "user_id,item_id,price"])
def test_several_files_have_the_same_columns(tmp_path, capsys, first):
    write(tmp_path / "log-1.csv", f"{first}\n")
    other = {"user_id,item_id", "user_id,item_id,price"} - {first}
    write(tmp_path / "log-2.csv", f"{other.pop()}\n")
    assert main(["table", str(tmp_path / "log-*.csv"), "--out", str(tmp_path / "out")]) == 2
    has = "no column 'price', which" if "price" in first else "the column 'price', which"
    assert f"log-2.csv has {has} {tmp_path / 'log-1.csv'} has" in capsys.readouterr().err


def test_columns_that_nothing_is_read_from_may_differ(tmp_path):
    write(tmp_path / "log-1.csv", "user_id,item_id\nu,a\n")
    write(tmp_path / "log-2.csv", "colour,user_id,item_id\nred,u,b\n")
    assert main(["table", str(tmp_path / "log-*.csv"), "--out", str(tmp_path / "out")]) == 0
    assert [e["item_id"] for e in load(tmp_path / "out")[1]] == ["a", "b"]


def test_times_of_the_item_table_are_not_dropped_without_a_word(tmp_path, capsys):
    items = write(tmp_path / "items.csv", "item_id,available_from,available_until\na,2024-01-01,\n")
    out = import_table(tmp_path, "user_id,item_id\nu,a\n", "--items", str(items))
    assert "available_from" not in load(out)[2][0]
    shown = " ".join(capsys.readouterr().err.split())
    assert "available_from and available_until of the item table left out: the events have no times" in shown


def test_places_in_a_sequence_have_no_gaps_where_rows_were_rejected(tmp_path):
    out = import_table(tmp_path, "user_id,item_id\nu,a\nu,\nu,b\n", "--max_rejected", "0.5")
    assert [e["timestamp"] for e in load(out)[1]] == [0, 1]


def test_too_many_bad_rows_leave_nothing_but_the_rejected_rows(tmp_path, capsys):
    log = write(tmp_path / "log.csv", HEADER + GOOD + "u1,i1,x,view,1\n")
    out = tmp_path / "deep" / "out"
    assert main(["table", str(log), "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert "1 of 2 rows (50.0%)" in err
    assert "unreadable timestamp (1)" in err
    kept = tmp_path / "deep" / "out.rejected.parquet"
    assert str(kept) in err
    assert list(out.parent.iterdir()) == [kept]
    assert reasons_of(kept) == ["unreadable timestamp"]


def reasons_of(path: Path) -> list[str]:
    return pl.read_parquet(path)["reason"].to_list()


def test_the_limit_itself_is_allowed(tmp_path):
    import_table(tmp_path, HEADER + GOOD * 3 + "u1,,2024-01-01,view,1\n", "--max_rejected", "0.25")


# --- ids ------------------------------------------------------------------------------------------

ids = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\n"), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(ids, ids), min_size=1, max_size=12))
def test_ids_survive_and_no_row_vanishes(tmp_path_factory, rows):
    tmp_path = tmp_path_factory.mktemp("ids")
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)  # a bare \r would end a line
    writer.writerows([("user_id", "item_id"), *rows])
    log = write(tmp_path / "log.csv", text.getvalue())
    good = [(user, item) for user, item in rows if not is_blank(user) and not is_blank(item)]
    code = main(["table", str(log), "--out", str(tmp_path / "out"), "--max_rejected", "1"])
    assert code == (0 if good else 2)
    if good:
        dataset, events, items = load(tmp_path / "out")
        assert [(e["user_id"], e["item_id"]) for e in events] == good
        assert dataset.info.num_events + dataset.info.num_rejected == len(rows)
        assert [i["item_id"] for i in items] == list(dict.fromkeys(item for _, item in good))
        assert dataset.info.num_users == len({user for user, _ in good})


def is_blank(text: str) -> bool:
    return pl.Series([text]).str.strip_chars().item() == ""


lines = st.text(st.sampled_from('ab ,"0\t'), max_size=8)


@settings(max_examples=60, deadline=None)
@given(source=st.lists(lines, min_size=1, max_size=12))
def test_accepted_and_rejected_are_all_the_lines(tmp_path_factory, source):
    tmp_path = tmp_path_factory.mktemp("lines")
    log = write(tmp_path / "log.csv", "user_id,item_id\n" + "\n".join([*source, "u,i"]) + "\n")
    assert main(["table", str(log), "--out", str(tmp_path / "out"), "--max_rejected", "1"]) == 0
    info = Dataset.open(tmp_path / "out").info
    assert info.num_events + info.num_rejected == sum(line != "" for line in source) + 1


def test_the_last_fact_wins_in_a_log_of_many_chunks(tmp_path):
    rows = 300_000
    frame = pl.DataFrame({"user_id": range(rows)}).with_columns(
        item_id=pl.col("user_id") % 50,
        brand=pl.when(pl.col("user_id") % 97 == 0).then(pl.format("b{}", "user_id")),
    )
    frame.write_csv(tmp_path / "log.csv")
    assert main(["table", str(tmp_path / "log.csv"), "--out", str(tmp_path / "out")]) == 0
    _, events, items = load(tmp_path / "out")
    assert [int(e["user_id"]) for e in events] == list(range(rows))
    expected = frame.group_by("item_id", maintain_order=True).agg(pl.col("brand").drop_nulls().last())
    assert [(int(i["item_id"]), i["brand"]) for i in items] == expected.rows()


# --- the command ----------------------------------------------------------------------------------


def test_overwrite(tmp_path, capsys):
    log = write(tmp_path / "log.csv", "user_id,item_id\n1,2\n")
    command = ["table", str(log), "--out", str(tmp_path / "out")]
    (tmp_path / "out").mkdir()  # an empty directory is as good as none
    assert main(command) == 0
    before = Dataset.open(tmp_path / "out").info
    write(log, "user_id,item_id\n1,3\n")
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert Dataset.open(tmp_path / "out").info == before
    write(log, "user_id,item_id\n,\n")
    assert main([*command, "--overwrite"]) == 2  # a failed import leaves the old data set
    assert Dataset.open(tmp_path / "out").info == before
    write(log, "user_id,item_id\n1,3\n")
    assert main([*command, "--overwrite"]) == 0
    assert load(tmp_path / "out")[2] == [{"item_id": "3"}]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_overwrite_replaces_nothing_but_a_data_set(tmp_path, capsys):
    log = write(tmp_path / "log.csv", "user_id,item_id\n1,2\n")
    precious = write(tmp_path / "out" / "thesis.txt", "...")
    assert main(["table", str(log), "--out", str(tmp_path / "out"), "--overwrite"]) == 2
    assert "not a data set" in capsys.readouterr().err
    assert precious.exists()


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("user,item_id\n1,2\n", [], "did you mean 'user'"),
        ("user_id,item_id\n1,2\n", ["--columns.price", "cost"], "--columns.price"),
        ("user_id,item_id\n1,2\n", ["--event_types", '{"buy": "bought"}'], "'bought'"),
        ("user_id,item_id\n1,2\n", ["--default_event_type", "look"], "'look'"),
        ("user_id,item_id\n1,2\n", ["--max_rejected", "5"], "expected 0 to 1"),
        ("user_id,item_id\n1,2\n", ["--separator", "::"], "separator"),
        ("user_id,item_id,timestamp\n1,2,3\n", [], "--time_unit"),
        ("user_id,item_id,user_id\n1,2,3\n", [], "more than once"),
        ("user_id,item_id\n", [], "no events"),
        ("", [], "is empty"),
    ],
)
def test_a_fault_of_the_user_is_said_and_ends_with_2(tmp_path, capsys, text, options, message):
    log = write(tmp_path / "log.csv", text)
    assert main(["table", str(log), "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [log]


@pytest.mark.parametrize("format_name", ["s3rec", "lightgcn", "pairs", "recbole", "table"])
def test_a_missing_source(tmp_path, capsys, format_name):
    assert main([format_name, str(tmp_path / "nothing"), "--out", str(tmp_path / "out")]) == 2
    assert "nothing" in capsys.readouterr().err


def test_text_that_is_not_utf8_is_an_error(tmp_path, capsys):
    (tmp_path / "log.csv").write_bytes(b"user_id,item_id\n1,\xff\n")
    assert main(["table", str(tmp_path / "log.csv"), "--out", str(tmp_path / "out")]) == 2
    assert "utf" in capsys.readouterr().err


def test_an_unknown_option_is_an_error(tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["pairs", "x", "--out", str(tmp_path), "--time_unit", "s"])
    assert stop.value.code == 2


def test_stdout_has_the_directory_or_the_json(tmp_path, capsys):
    out = import_table(tmp_path, "user_id,item_id\n1,2\n")
    assert capsys.readouterr().out == f"{out}\n"
    import_table(tmp_path, "user_id,item_id\n1,2\n", "--overwrite", "--json", "--name", "mine")
    info = json.loads(capsys.readouterr().out)
    assert (info["name"], info["num_events"], info["source"]["files"]) == ("mine", 1, ["log.csv"])


def test_the_same_source_gives_the_same_fingerprint(tmp_path):
    prints = set()
    for name in ("a", "b"):
        out = import_table(tmp_path / name, HEADER + GOOD)
        prints.add(Dataset.open(out).info.fingerprint)
    assert len(prints) == 1


def test_help_shows_the_rees46_command(capsys):
    with pytest.raises(SystemExit):
        main(["table", "--help"])
    assert (
        "\n  trirank import table 2019-Oct.csv.gz --out data/rees46 --repeats \\\n" in capsys.readouterr().out
    )


def test_importing_loads_no_torch():
    code = "import sys, training.data.importing as i; i.build_parser(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
