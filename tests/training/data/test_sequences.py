"""Training windows: every event is learned from once, from nothing but what came before it."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.history import EVENT_CODE, NEGATIVE_EVENT, without_repeats
from training.data.interactions import MAX_EVENTS, Interactions
from training.data.sequences import (
    equal_share,
    make_sequences,
    sequence_batches,
    targets_per_item,
)

VIEW = EVENT_CODE["view"]
LENGTH = 4  # T of the worked-out windows


def interactions(histories, event_types=None):
    """Return the events of users 1, 2, ... with these histories."""
    items = [item for history in histories for item in history]
    return Interactions(
        np.repeat(np.arange(1, len(histories) + 1), [len(h) for h in histories]).astype(np.int32),
        np.array(items, np.int32),
        np.array(event_types or [VIEW] * len(items), np.uint8),
        np.arange(len(items)),
        num_users=len(histories),
        num_items=100,
    )


def windows(histories, length=LENGTH, **options):
    sequences = make_sequences(interactions(histories), length, **options)
    return list(
        zip(sequences.starts.tolist(), sequences.ends.tolist(), sequences.has_start.tolist(), strict=True)
    )


def batches(sequences, batch_size=100, max_tokens=10_000, seed=None):
    rng = None if seed is None else np.random.default_rng(seed)
    return list(sequence_batches(sequences, batch_size, max_tokens, rng))


def predictions(found):
    """Return (items before, item to predict) of every target of some batches."""
    result = []
    for batch in found:
        for history, targets in zip(batch.history.tolist(), batch.targets.tolist(), strict=True):
            for place, target in enumerate(targets):
                if target:
                    result.append(([item for item in history[:place] if item], target))
    return result


def test_a_machine_is_not_most_of_what_is_learned():
    machine = [1 + n % 2 for n in range(MAX_EVENTS + 1000)] + [9]
    events = interactions([[1, 2], machine, [3, 4]])
    sequences = make_sequences(events, LENGTH, repeats=True)
    assert len(sequences.items) == 2 + MAX_EVENTS + 2
    assert sequences.num_left_out == 1001
    assert 9 in sequences.items  # what is left out is the oldest
    assert targets_per_item(events, repeats=True) == pytest.approx((4 + MAX_EVENTS) / 5)


@pytest.mark.parametrize(
    ("num_events", "expected"),
    [
        (0, []),
        (1, [(0, 1, True)]),
        (LENGTH - 1, [(0, 3, True)]),
        (LENGTH, [(0, 4, True)]),
        # The window from the middle has a place more, which is input alone and the last target of the other.
        (LENGTH + 1, [(0, 5, False), (0, 1, True)]),
        (2 * LENGTH, [(3, 8, False), (0, 4, True)]),
        (2 * LENGTH + 1, [(4, 9, False), (0, 5, False), (0, 1, True)]),
    ],
)
def test_windows_of_one_history(num_events, expected):
    assert windows([list(range(1, num_events + 1))]) == expected


def test_a_batch_worked_out():
    sequences = make_sequences(interactions([[1, 2, 3], [4], [5, 6, 7, 8, 9]]), LENGTH)
    (batch,) = batches(sequences)
    rows = [
        (history, targets)
        for history, targets in zip(batch.history.tolist(), batch.targets.tolist(), strict=True)
    ]
    assert sorted(rows) == [
        # The start token, behind padding alone, predicts a history's first item ...
        ([0, 0, 0, 0], [0, 0, 0, 0, 4]),
        ([0, 0, 0, 0], [0, 0, 0, 0, 5]),
        ([0, 0, 1, 2], [0, 0, 1, 2, 3]),
        # ... but not the first item of a window that begins in the middle.
        ([5, 6, 7, 8], [0, 6, 7, 8, 9]),
    ]
    assert batch.history.dtype == batch.targets.dtype == torch.int64


def test_single_events_still_have_a_history_of_padding():
    (batch,) = batches(make_sequences(interactions([[7], [8]]), LENGTH))
    assert batch.history.tolist() == [[0], [0]]
    assert batch.targets.tolist() == [[0, 7], [0, 8]]


def test_runs_count_once_and_known_items_are_input_only():
    sequences = make_sequences(interactions([[1, 1, 2, 1, 3, 3, 3]]), LENGTH)
    assert predictions(batches(sequences)) == [([], 1), ([1], 2), ([1, 2, 1], 3)]


def test_with_repeats_known_items_are_learned_too():
    sequences = make_sequences(interactions([[1, 1, 2, 1, 3, 3, 3]]), LENGTH, repeats=True)
    assert predictions(batches(sequences)) == [([], 1), ([1], 2), ([1, 2], 1), ([1, 2, 1], 3)]


@pytest.mark.parametrize("repeats", [False, True])
def test_what_was_removed_from_the_cart_is_no_wish(repeats):
    events = interactions([[1, 2, 3]], [VIEW, NEGATIVE_EVENT, VIEW])
    found = predictions(batches(make_sequences(events, LENGTH, repeats=repeats)))
    assert found == [([], 1), ([1], 3)]


def test_windows_with_nothing_to_predict_are_left_out():
    """A batch of such windows alone would have the loss 0/0."""
    events = interactions([[1], [1, 2, 1, 2, 1, 2, 1, 2], [3]], [VIEW] * 9 + [NEGATIVE_EVENT])
    sequences = make_sequences(events, 2)
    assert predictions(batches(sequences)) == [([], 1), ([], 1), ([1], 2)]
    for batch in batches(sequences, batch_size=1, seed=0):
        assert (batch.targets > 0).any()


def test_the_density_counts_what_can_be_learned():
    cart = EVENT_CODE["cart"]
    events = interactions([[1, 1, 2, 1], [1, 2, 3]], [VIEW, cart, VIEW, VIEW, VIEW, NEGATIVE_EVENT, VIEW])
    assert targets_per_item(events, repeats=False) == 4 / 3  # 1, 2 of one; 1, 3 of the other
    assert targets_per_item(events, repeats=True) == 5 / 3  # and 1 again
    assert targets_per_item(interactions([[1]], [NEGATIVE_EVENT]), repeats=False) == 0


HISTORIES = st.lists(st.lists(st.integers(1, 6), max_size=12), min_size=1, max_size=4).filter(any)


def test_long_batches_have_few_shapes():
    """Kernels are compiled for each; and none is longer than the longest window."""
    rng = np.random.default_rng(0)
    histories = [rng.integers(1, 999, length).tolist() for length in rng.integers(2, 90, 600)]
    sequences = make_sequences(interactions(histories), 60)
    found = batches(sequences, batch_size=16, max_tokens=400, seed=0)
    widths = {batch.history.shape[1] + 1 for batch in found}
    assert {width for width in widths if width > 16} == {24, 32, 40, 48, 56, 61}
    # How many windows fit follows from the length; fewer are left at the end.
    assert len({batch.history.shape for batch in found}) <= len(widths) + 1
    for batch in found:
        rows, width = batch.history.shape
        assert rows * (width + 1) <= 400


@settings(deadline=None, max_examples=60)
@given(HISTORIES, st.integers(1, 5), st.booleans(), st.integers(1, 4), st.integers(1, 12), st.data())
def test_every_event_is_learned_from_once(histories, length, repeats, batch_size, max_tokens, data):
    # Items tell whose they are.
    histories = [[10 * user + item for item in history] for user, history in enumerate(histories, start=1)]
    num_events = sum(map(len, histories))
    kinds = data.draw(
        st.lists(st.sampled_from([VIEW, VIEW, NEGATIVE_EVENT]), min_size=num_events, max_size=num_events)
    )
    sequences = make_sequences(interactions(histories, kinds), length, repeats=repeats)
    found = batches(sequences, batch_size, max_tokens, seed=0)

    expected, position = [], 0
    for history in histories:
        before, known = [], set()
        for item, kind in zip(history, kinds[position : position + len(history)], strict=True):
            if kind == NEGATIVE_EVENT or (before and before[-1] == item):
                continue
            if repeats or item not in known:
                expected.append((before.copy(), item))
            before.append(item)
            known.add(item)
        position += len(history)

    predicted = predictions(found)
    assert Counter(target for _, target in predicted) == Counter(target for _, target in expected)
    for before, target in predicted:
        # What a target is predicted from is the end of what came before it, nothing else; the start token
        # alone predicts first items alone.
        assert len(before) <= length
        assert any(
            target == item and (full[-len(before) :] == before if before else not full)
            for full, item in expected
        )
    for batch in found:
        rows, width = batch.history.shape
        assert batch.targets.shape == (rows, width + 1)
        assert 1 <= width <= length
        assert rows <= batch_size
        assert rows == 1 or rows * width <= max_tokens
        for history in batch.history.tolist():
            assert history == sorted(history, key=bool)  # padding, then items


def test_the_first_window_sees_all_and_later_ones_a_full_history_at_their_end():
    (batch,) = batches(make_sequences(interactions([list(range(1, 12))]), LENGTH))
    contexts = {target: before for before, target in predictions([batch])}
    assert contexts[11] == [7, 8, 9, 10]
    assert contexts[8] == [7]
    assert contexts[7] == [3, 4, 5, 6]
    assert contexts[3] == [1, 2]
    assert contexts[1] == []


def many():
    rng = np.random.default_rng(0)
    return make_sequences(interactions([rng.integers(1, 90, n % 9).tolist() for n in range(60)]), 6)


def as_lists(found):
    return [(batch.history.tolist(), batch.targets.tolist()) for batch in found]


def test_the_draw_decides_which_windows_meet():
    assert as_lists(batches(many(), 8, seed=5)) == as_lists(batches(many(), 8, seed=5))
    assert as_lists(batches(many(), 8, seed=5)) != as_lists(batches(many(), 8, seed=6))
    assert as_lists(batches(many(), 8)) == as_lists(batches(many(), 8))
    for found in (batches(many(), 8), batches(many(), 8, seed=5), batches(many(), 1, seed=5)):
        assert sorted(predictions(found)) == sorted(predictions(batches(many())))


def test_windows_of_like_length_meet():
    for batch in batches(many(), 8, seed=5):
        lengths = (batch.history > 0).sum(1)
        assert lengths.max() - lengths.min() <= 2


def test_no_events_no_batches():
    assert batches(make_sequences(interactions([[]]), LENGTH), seed=0) == []


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 3), max_size=10))
def test_serving_drops_the_repeats_that_training_drops(history):
    trained_on = make_sequences(interactions([history]), 20, repeats=True).items.tolist()
    assert without_repeats(np.array(history, np.int32)).tolist() == trained_on


@pytest.mark.parametrize(("num_batches", "world_size"), [(7, 2), (6, 3), (5, 1), (4, 4)])
def test_processes_share_batches_equally_and_none_twice(num_batches: int, world_size: int) -> None:
    shares = [equal_share(range(num_batches), rank, world_size) for rank in range(world_size)]
    assert {len(share) for share in shares} == {num_batches // world_size}
    seen = [batch for share in shares for batch in share]
    assert len(set(seen)) == len(seen)


def test_fewer_batches_than_processes_go_to_all() -> None:
    assert [list(equal_share([0, 1], rank, 3)) for rank in range(3)] == [[0, 1]] * 3


def test_the_kinds_of_an_item_are_all_that_the_user_did_with_it():
    view, click, cart, purchase = (EVENT_CODE[name] for name in ("view", "click", "cart", "purchase"))
    done = [(1, view), (1, click), (2, view), (1, purchase), (3, cart), (2, view)]
    events = interactions([[item for item, _ in done]], [kind for _, kind in done])

    def kinds(repeats):
        (batch,) = batches(make_sequences(events, 10, repeats=repeats))
        pairs = zip(batch.targets[0].tolist(), batch.target_kinds[0].tolist(), strict=True)
        return [(target, {code for code in range(8) if kind >> code & 1}) for target, kind in pairs if target]

    once = [(1, {view, click, purchase}), (2, {view}), (3, {cart})]
    assert kinds(repeats=False) == once
    # Where people come back to items, each visit stands alone.
    assert kinds(repeats=True) == [
        (1, {view, click}),
        (2, {view}),
        (1, {purchase}),
        (3, {cart}),
        (2, {view}),
    ]


def test_a_batch_has_users_of_one_fold():
    rng = np.random.default_rng(3)
    sequences = make_sequences(interactions([rng.integers(1, 90, n % 9).tolist() for n in range(60)]), 6)
    plain = predictions(sequence_batches(sequences, 5, 1000, np.random.default_rng(0)))
    found = list(sequence_batches(sequences, 5, 1000, np.random.default_rng(0), num_folds=4))
    assert sorted(map(str, predictions(found))) == sorted(map(str, plain))
    assert {batch.fold for batch in found} == {0, 1, 2, 3}
    sequences = make_sequences(interactions([[user, 20 + user, 40 + user] for user in range(1, 9)]), 6)
    users = [
        (int(user), batch.fold)
        for batch in sequence_batches(sequences, 5, 1000, None, num_folds=3)
        for user in batch.targets[:, 0]
    ]
    assert sorted(users) == [(user, user % 3) for user in range(1, 9)]
