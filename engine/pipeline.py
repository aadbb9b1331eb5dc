"""One request, top to bottom: all items -> candidates -> the best few hundred -> the slate.

Read RecommendationPipeline.recommend first; the methods below it are one stage each. Stages exchange arrays
of item rows (row 17 means the same item everywhere). Strings become rows before (resolve_visitor,
Catalog.rows) and rows become strings after, so that evaluation can ask with rows alone.

Shape legend: I items, H events of a history, N items of a list, D dimension.
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine import workplaces
from engine.bundle import Bundle
from engine.deadline import Budget, StageCosts
from engine.event_store import merge as merge_events
from engine.events import EventStore, StoreUnavailableError
from engine.history import (
    EMPTY_HISTORY,
    EVENT_CODE,
    EVENT_TYPES,
    NEGATIVE_EVENT,
    History,
    left_padded,
    not_asked_for,
)
from engine.item_list import ItemList, Ranked
from engine.policies import Arrangement, Filtered, explanation, exposure_of, item_facts
from engine.sources import check_sources, choice, is_number, sources_from_config
from engine.telemetry import LimitedLog
from engine.trace import StageTiming, Trace, VisitorKind
from ranking.context import Encoded
from ranking.transitions import TransitionBonus
from reranking.constraints import DropSeen
from reranking.items import Request
from reranking.policy import Policies, Policy, policies_from_config
from reranking.reranker import NO_PURCHASES, Funnel, Purchases, Reranker
from retrieval.fold_in import event_weights, fold_in
from retrieval.sources import (
    Candidates,
    CandidateSource,
    EmbeddingSource,
    Gathering,
    PopularSource,
    Query,
)
from retrieval.transitions import next_items

logger = logging.getLogger(__name__)
seldom = LimitedLog(logger)

MAX_LIMIT = 500  # items of a slate
MAX_CANDIDATES = 10_000
MAX_HEAD_WEIGHT = 100
MAX_SCORE_WEIGHT = 10
NO_ROWS = np.zeros(0, np.int32)
DAY_MS = 86_400_000


class Event(NamedTuple):
    """Something a visitor did, as a request tells it."""

    item_id: str
    event_type: str = "interaction"  # one of engine.history.EVENT_TYPES
    timestamp: int = 0  # the data set's clock; 0 means just now


@dataclass(frozen=True)
class Visitor:
    """Who is asking, in rows."""

    history: History  # all that is known, oldest first
    user_row: int = 0  # 1..U; 0 for a user whom the bundle does not know
    is_unknown_user: bool = False  # a user id was given, and the bundle does not know it
    num_unknown_items: int = 0  # events of the request that were left out: the catalog lacks their item
    resolving_s: float = 0.0  # what it took to find all this out: part of the request's time
    asked: StageTiming | None = None  # the stage "history": the event store was asked
    is_degraded: bool = False  # and did not answer

    @property
    def kind(self) -> VisitorKind:
        """How well the visitor is known."""
        if self.user_row:
            return VisitorKind.KNOWN_USER
        return VisitorKind.HISTORY_ONLY if len(self.history) else VisitorKind.ANONYMOUS


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Hard conditions, as Catalog.matching takes them; an empty field is no condition."""

    categories: Sequence[str] = ()
    brands: Sequence[str] = ()
    seller_ids: Sequence[str] = ()
    min_price: float | None = None
    max_price: float | None = None

    def __bool__(self) -> bool:
        """Return whether there is any condition."""
        prices = (self.min_price, self.max_price)
        return bool(self.categories or self.brands or self.seller_ids) or prices != (None, None)


NO_FILTERS = Filters()
NO_CONTEXT: Mapping[str, str] = MappingProxyType({})
NO_WEIGHTS: Mapping[str, float] = MappingProxyType({})
NOBODY = Visitor(EMPTY_HISTORY)
NUMBERS = itertools.count()  # of pipelines: no two of a process are taken for each other


class Answer(NamedTuple):
    """What the pipeline gives back."""

    items: ItemList
    trace: Trace


class RecommendationPipeline:
    """The funnel over one bundle. Holds no state of a request: any number of threads may call it at once."""

    def __init__(
        self, bundle: Bundle, policies: Policies | None = None, events: EventStore | None = None
    ) -> None:
        """Take a bundle and what changes while it is served.

        Args:
            bundle: what to answer from.
            policies: to arrange slates by; the bundle's own where None.
            events: what users did since the bundle was made; None where nothing is recorded.

        Raises ValueError where the bundle's settings are wrong, PolicyError where a policy does not fit it.
        """
        self.bundle = bundle
        self.events = events
        self.variant = ""  # another name where another bundle is served to others
        self.costs = StageCosts()
        self.number = next(NUMBERS)
        settings = bundle.manifest["pipeline"]
        check_settings(settings)
        self.sources, self.quotas = sources_from_config(settings["sources"], bundle)
        self.last_resort = [source for source in self.sources if isinstance(source, PopularSource)]
        facts = item_facts(bundle.catalog, bundle.item_vectors, bundle.content_vectors)
        self.reranker = Reranker(policies or policies_from_config(bundle.manifest["policies"]), facts)
        self.norms = np.linalg.norm(bundle.item_vectors, axis=1)  # [I+1]
        self.num_candidates: int = settings["num_candidates"]
        self.num_ranked: int = settings["num_ranked"]
        self.default_limit: int = settings["default_limit"]
        # Where people return to the same items (groceries, sessions), the last one alone counts as seen.
        self.has_repeats: bool = bundle.manifest["data"].get("repeats", False)
        self.has_clock = bundle.manifest["data"]["time"] == "unix"
        # What the ranker knows of the moment, beside what the policy asks for.
        self.context_keys = frozenset(bundle.scorer.context.names if bundle.scorer else ())
        # What the ranker scores for, where it is more than one thing.
        self.heads: tuple[str, ...] = bundle.scorer.heads if bundle.scorer else ()
        self.head_weights = default_head_weights(bundle)
        self._bonus = TransitionBonus(bundle.catalog.num_items)

    def with_policies(self, policies: Policies) -> RecommendationPipeline:
        """Return a pipeline over the same bundle with other policies; this one stays as it is.

        Raises PolicyError where a policy does not fit the bundle.
        """
        other = copy.copy(self)
        other.reranker = Reranker(policies, self.reranker.facts)
        other.number = next(NUMBERS)
        return other

    def policy(self, name: str = "", overrides: Mapping[str, float] | None = None) -> Policy:
        """Return a policy for `recommend`; the default one for "". PolicyError where there is no such."""
        return self.reranker.policy(name, overrides)

    # The three questions.

    def recommend(
        self,
        visitor: Visitor,
        limit: int,
        *,
        filters: Filters = NO_FILTERS,
        excluded: NDArray[np.int32] = NO_ROWS,
        budget: Budget | None = None,
        now: int | None = None,
        policy: Policy | None = None,
        seed: int = 0,
        context: Mapping[str, str] = NO_CONTEXT,
        explain: bool = False,
        head_weights: Mapping[str, float] = NO_WEIGHTS,
    ) -> Answer:
        """Return the slate: the `limit` best items, fewer only where fewer are eligible.

        Filters, those of the policy too, and exclusions are hard: they are taken before all other stages, so
        that no stage, failing or not, can show what they forbid. Where the policy drops what the visitor has
        seen, it is left out while `limit` other items are eligible. A stage that fails, or would take more
        time than it has, is passed over, ranking is cut to the candidates that it has time for, and the trace
        says so; a candidate source that fails is passed over alone.

        Args:
            visitor: who asks.
            limit: at least 1.
            filters: what an item must be.
            excluded: rows that must not be shown.
            budget: the time that there is; without end where None. AbandonedError where it is cancelled.
            now: time of the request on the data set's clock, which decides what is fresh and what is not on
                sale yet; the time of the newest training event where it is not given.
            policy: one that `policy` returned, of this pipeline; the default one where None.
            seed: of all that is random; the same question with the same seed gets the same slate.
            context: what else is known, such as {"region": "DE", "age": "17"}; what rules and the ranker
                may ask for.
            explain: whether to work out the reasons (trace.arrangement.explanation).
            head_weights: how much each of `heads` counts, 0 where one is left out; the bundle's own weights
                where none is given.
        """
        _check_limit(limit)
        trace = self.begin_trace(visitor, budget)
        query = self.query(visitor, now, context, head_weights)
        num_items = self.bundle.catalog.num_items
        request = Request(now_ms=query.now if self.has_clock else None, seed=seed, context=context)
        ask = _Ask(policy or self.policy(), request, _purchases(visitor.history), explain)
        trace.arrangement = Arrangement(ask.policy.name, seed, request.now_ms)

        eligible = trace.run(
            "filtering",
            lambda: self._eligible(filters, excluded, ask),
            num_in=num_items,
            size=np.count_nonzero,
        )
        seen = self._seen(visitor, ask.policy)
        candidates = trace.run(
            "retrieval",
            lambda: self._retrieve(query, eligible, seen, limit, trace),
            # A source that gives what is no item fails where all are gathered, and would again.
            otherwise=lambda: self._retrieve(query, eligible, seen, limit, trace, self.last_resort),
            num_in=trace.timings[-1].num_out,
        )
        num_ranked = max(self.num_ranked, limit)
        num_scored = trace.affordable("ranking", len(candidates))
        ranked = trace.run(
            "ranking",
            lambda: self._rank(query, candidates, num_ranked, num_scored),
            otherwise=lambda: Ranked.as_they_are(candidates.in_turns(self.quotas), num_ranked),
            num_in=len(candidates),
            num_affordable=num_scored,
            size=lambda found: len(found.items),
        )
        slate = trace.run(
            "reranking",
            lambda: self._rerank(ask, query, candidates, ranked, eligible, seen, limit, trace),
            otherwise=lambda: ranked.items.take(slice(limit)),
            num_in=len(ranked.items),
        )
        return Answer(slate, trace)

    def similar(
        self,
        item_row: int,
        limit: int,
        *,
        filters: Filters = NO_FILTERS,
        excluded: NDArray[np.int32] = NO_ROWS,
        budget: Budget | None = None,
        now: int | None = None,
        policy: Policy | None = None,
        context: Mapping[str, str] = NO_CONTEXT,
    ) -> Answer:
        """Return the items whose vectors have the largest cosine with an item's; never the item itself.

        An item without a vector, new and like no other, has no direction: popular items stand in. Of the
        policy only the hard filters count. The arguments are those of `recommend`.
        """
        _check_limit(limit)
        if not 1 <= item_row <= self.bundle.catalog.num_items:
            raise ValueError(f"item_row is {item_row}; expected 1 to {self.bundle.catalog.num_items}")
        trace = Trace(
            self.bundle.version, variant=self.variant, budget=budget or Budget(None), costs=self.costs
        )
        request = Request(now_ms=self.query(NOBODY, now).now if self.has_clock else None, context=context)
        ask = _Ask(policy or self.policy(), request)
        eligible = trace.run(
            "filtering",
            lambda: self._eligible(filters, np.append(excluded, np.int32(item_row)), ask),
            num_in=self.bundle.catalog.num_items,
            size=np.count_nonzero,
        )
        items = trace.run(
            "retrieval",
            lambda: self._nearest(item_row, eligible, limit, trace),
            otherwise=lambda: self._most_popular(eligible, limit, trace),
            num_in=trace.timings[-1].num_out,
        )
        return Answer(items, trace)

    def rank(
        self,
        visitor: Visitor,
        candidates: NDArray[np.int32],
        *,
        budget: Budget | None = None,
        now: int | None = None,
        context: Mapping[str, str] = NO_CONTEXT,
        head_weights: Mapping[str, float] = NO_WEIGHTS,
    ) -> Answer:
        """Return the caller's own candidates (rows, none twice), best first, all of them.

        Where time is short, the most popular are scored and stand before the others. The other arguments are
        those of `recommend`.
        """
        trace = self.begin_trace(visitor, budget)
        popularity = self.bundle.catalog.popularity[candidates].astype(np.float32)
        asked = ItemList.of_one(candidates, popularity, "caller")
        by_popularity = asked.ordered_by(popularity, len(asked)).items
        num_scored = trace.affordable("ranking", len(asked))
        query = self.query(visitor, now, context, head_weights)

        items = trace.run(
            "ranking",
            lambda: self._rank(query, by_popularity, len(asked), num_scored).items,
            otherwise=lambda: by_popularity,
            num_in=len(asked),
            num_affordable=num_scored,
        )
        return Answer(items, trace)

    # Before the stages: strings become rows.

    def resolve_visitor(
        self, user_id: str, events: Sequence[Event] = (), budget: Budget | None = None
    ) -> Visitor:
        """Return the visitor in rows: the bundle's history of the user, what was recorded since, and the
        request's events, merged by time (see event_store.merge).

        Where the event store does not answer, fails, or would take more time than there is, the visitor is
        made without it and marked degraded.
        """
        begin, own_begin = time.perf_counter(), workplaces.clock()
        stored = history = self.bundle.users.get(user_id)
        asked, is_degraded = None, False
        if user_id and self.events is not None:
            merged = self._with_recent(stored, self.events, user_id, budget or Budget(None))
            is_degraded = merged is None
            history = merged or stored
            end = begin + workplaces.clock() - own_begin
            asked = StageTiming("history", begin, end, len(stored), len(history))
        history, num_unknown = merge_events(history, events, self.bundle.catalog)
        user_row = self.bundle.users.row(user_id)
        is_unknown = bool(user_id) and not user_row
        resolving_s = time.perf_counter() - begin
        return Visitor(history, user_row, is_unknown, num_unknown, resolving_s, asked, is_degraded)

    def _with_recent(
        self, history: History, events: EventStore, user_id: str, budget: Budget
    ) -> History | None:
        """Return a history with what was recorded of a user; None where the store does not say it, or not in
        time, or nobody can read it.

        The stage "history", but before the trace begins: that tells what is known of the visitor.
        """
        budget.check()
        later_s = self.costs.usual(budget.later("history"))
        if not budget.affordable("history", 1, self.costs.per_item("history"), later_s):
            seldom.warning("history was skipped: too little time")
            self.costs.ease("history")
            return None
        begin = workplaces.clock()
        try:
            recent = events.recent(user_id, budget.allowance("history", later_s))
            return merge_events(history, recent, self.bundle.catalog)[0]
        except StoreUnavailableError:  # the store itself has logged it
            return None
        except Exception as error:  # noqa: BLE001  # whatever it is, it is this stage's alone
            seldom.exception("history failed; the answer is made without it", error)
            return None
        finally:  # what failed late would again
            self.costs.observe("history", workplaces.clock() - begin, 1)

    def query(
        self,
        visitor: Visitor,
        now: int | None = None,
        context: Mapping[str, str] = NO_CONTEXT,
        head_weights: Mapping[str, float] = NO_WEIGHTS,
    ) -> Query:
        """Return what the stages may know; the ranker's state is worked out once, when first asked for."""
        weights_of_heads = self.head_weights
        if head_weights:
            weights_of_heads = np.array([[head_weights.get(name, 0.0) for name in self.heads]], np.float32)
        clock = self.bundle.manifest["data"]["clock"]
        moment = clock if now is None else now

        @functools.cache
        def state() -> NDArray[np.float32]:
            scorer = self.bundle.scorer
            assert scorer is not None
            history = left_padded([visitor.history.wanted], scorer.history_length)
            rows, weights = scorer.context.encode(context, moment if self.has_clock else None)
            asked_in = Encoded(rows[np.newaxis], weights[np.newaxis])
            found: NDArray[np.float32] = scorer.user_states(history, asked_in, weights_of_heads)[0]
            return found

        @functools.cache
        def what_comes_next() -> tuple[NDArray[np.int32], NDArray[np.float32]]:
            if self.bundle.transitions is None:
                return NO_ROWS, np.zeros(0, np.float32)
            return next_items(self.bundle.transitions, visitor.history.wanted)

        weights = history_weights(self.bundle, visitor.history)
        counts = transition_weight(self.bundle, weights_of_heads)
        divisor = score_temperature(self.bundle, weights_of_heads)
        return Query(visitor.history.wanted, weights, state, moment, what_comes_next, counts, divisor)

    # The stages.

    def _eligible(self, filters: Filters, excluded: NDArray[np.int32], ask: _Ask) -> NDArray[np.bool_]:
        """Return which items may be shown at all: [I+1] bool, not to be changed.

        No later stage can bring one back.
        """
        allowed = self.reranker.allowed(ask.policy, ask.request, ask.purchases)
        if not (filters or len(excluded) or ask.explain):
            return allowed
        eligible = self.bundle.catalog.matching(
            filters.categories, filters.brands, filters.seller_ids, filters.min_price, filters.max_price
        )
        eligible[excluded] = False
        if ask.explain:
            num_in, left = self.bundle.catalog.num_items, eligible
            by_policy = self.reranker.filters(ask.policy, ask.request, ask.purchases)
            for name, mask in itertools.chain([("request", eligible)], by_policy):
                left = left & mask
                num_out = int(np.count_nonzero(left))
                ask.filtered.append(Filtered(name, num_in, num_out))
                num_in = num_out
        return eligible & allowed

    def _seen(self, visitor: Visitor, policy: Policy) -> NDArray[np.int32]:
        """Return the rows of what is not shown as it was seen; none where the policy does not mind."""
        if not any(isinstance(rule, DropSeen) for rule in policy.rules):
            return NO_ROWS
        return not_asked_for(visitor.history.items, self.has_repeats)

    def _retrieve(
        self,
        query: Query,
        eligible: NDArray[np.bool_],
        seen: NDArray[np.int32],
        limit: int,
        trace: Trace,
        sources: Sequence[CandidateSource] | None = None,
    ) -> ItemList:
        """Return unseen candidates; where they cannot fill a slate, seen ones fill up behind them."""
        allowed = eligible.copy()
        allowed[seen] = False
        unseen = self._find(query, allowed, max(self.num_candidates, limit), trace, sources)
        if len(unseen) >= limit or not len(seen):
            return unseen
        is_seen = np.zeros_like(eligible)
        is_seen[seen] = True
        others = self._find(query, eligible & is_seen, limit - len(unseen), trace, sources)
        return unseen.in_turns(self.quotas).followed_by(others.in_turns(self.quotas))

    def _find(
        self,
        query: Query,
        allowed: NDArray[np.bool_],
        limit: int,
        trace: Trace,
        sources: Sequence[CandidateSource] | None = None,
    ) -> ItemList:
        """Ask sources (None: all), each of which may fail alone, and gather what they find, source by source.

        `allowed` is changed.
        """
        quotas = self.quotas if sources is None else [1.0] * len(sources)
        sources = self.sources if sources is None else sources
        gathering = Gathering(quotas, limit, allowed)
        for source in sources:
            part = Candidates.none(source.name)
            if gathering.wanted:
                part = trace.run(
                    f"retrieval.{source.name}",
                    functools.partial(source.find, query, gathering.left, gathering.wanted),
                    otherwise=functools.partial(Candidates.none, source.name),
                    num_in=len(allowed) - 1,
                )
            gathering.add(part)
        found = ItemList(*gathering.merged(), tuple(source.name for source in sources))
        if len(found) == limit:
            return found
        # Too few items are allowed, or popular failed, which knows all of them.
        rest = np.flatnonzero(gathering.left)[: limit - len(found)].astype(np.int32)
        others = ItemList.of_one(rest, np.zeros(len(rest), np.float32), "catalog")
        return found.followed_by(others)

    def _most_popular(self, eligible: NDArray[np.bool_], limit: int, trace: Trace) -> ItemList:
        """Return what is found for somebody of whom nothing is known, best first."""
        found = self._find(self.query(NOBODY), eligible.copy(), limit, trace)
        return found.in_turns(self.quotas).with_falling_scores()

    def _nearest(self, item_row: int, eligible: NDArray[np.bool_], limit: int, trace: Trace) -> ItemList:
        """Return the items of the largest cosine, by one exact product with all vectors.

        Not by the index: it ranks by inner product, which favours the long vectors of popular items.
        """
        if not self.norms[item_row]:
            return self._most_popular(eligible, limit, trace)
        rows = np.flatnonzero(eligible).astype(np.int32)
        vectors = self.bundle.item_vectors
        products = vectors @ vectors[item_row]
        norms = self.norms * self.norms[item_row]
        cosines = np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)
        found = ItemList.of_one(rows, cosines[rows], EmbeddingSource.name)
        return found.ordered_by(found.scores, limit).items

    def _rank(self, query: Query, items: ItemList, num_kept: int, num_scored: int) -> Ranked:
        """Return the first `num_scored` items by score, and the others behind them in their order."""
        if num_scored >= len(items):
            return self._scored(query, items, num_kept)
        items = items.in_turns(self.quotas)  # a caller's own, of one source, stay as they are
        if not num_scored:
            return Ranked.as_they_are(items, num_kept)
        scored = self._scored(query, items.take(slice(num_scored)), num_scored).items
        others = items.take(slice(num_scored, None))
        lowest = np.full(len(others), scored.scores[-1], np.float32)
        whole = scored.followed_by(replace(others, scores=lowest))
        return Ranked(whole.take(slice(num_kept)), whole)

    def _scored(self, query: Query, items: ItemList, num_kept: int) -> Ranked:
        """Return the best items by the ranker; without one by the query vector; without that as they are."""
        if self.bundle.scorer:
            scores = self.bundle.scorer.score_states(query.state()[np.newaxis], items.rows[np.newaxis])[0]
            scores = scores / query.temperature
            if query.transition_weight:
                scores = scores + self._gained(query, items.rows)
            return items.ordered_by(scores, num_kept)
        vectors, degrees = self.bundle.item_vectors, self.bundle.item_degrees
        vector = fold_in(vectors, degrees, query.items, query.weights)
        if vector.any():
            return items.ordered_by(vectors[items.rows] @ vector, num_kept)
        return Ranked.as_they_are(items.in_turns(self.quotas), num_kept)

    def _gained(self, query: Query, rows: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return what it adds to items' scores that they have often come next, [N] float32."""
        return self._bonus(rows, *query.next_items(), query.transition_weight / query.temperature)

    def _rerank(
        self,
        ask: _Ask,
        query: Query,
        candidates: ItemList,
        ranked: Ranked,
        eligible: NDArray[np.bool_],
        seen: NDArray[np.int32],
        limit: int,
        trace: Trace,
    ) -> ItemList:
        """Return the slate that the policy makes, and tell the trace how."""
        is_seen = np.zeros(len(eligible), np.bool_)
        is_seen[seen] = True
        funnel = Funnel(
            rows=ranked.items.rows,
            scores=ranked.items.scores,
            reserve_rows=ranked.scored.rows,
            reserve_scores=ranked.scored.scores,
            seen=is_seen,
            eligible=eligible,
            purchases=ask.purchases,
        )
        arranged = self.reranker.slate(ask.policy, funnel, limit, ask.request, explain=ask.explain)
        trace.relaxed_rules = arranged.relaxed
        is_scored = self.bundle.scorer is not None and "ranking" not in trace.degraded_stages
        gained = functools.partial(self._gained, query) if is_scored else None
        trace.arrangement = Arrangement(
            ask.policy.name,
            ask.request.seed,
            ask.request.now_ms,
            arranged.yields,
            exposure_of(ask.policy, arranged, self.bundle.catalog),
            explanation(
                arranged,
                ask.filtered,
                candidates.in_turns(self.quotas) if ask.explain else candidates,
                ranked,
                gained,
            ),
        )
        order, num_ranked = arranged.order, len(ranked.items)
        if (order >= 0).all() and (order < num_ranked).all():
            return ranked.items.take(order)
        # Some come from the reserve, some are shown for a pin's sake alone.
        pinned = arranged.rows[order < 0]
        pins = ItemList.of_one(pinned, np.zeros(len(pinned), np.float32), "pin")
        found = ranked.items.followed_by(ranked.scored).followed_by(pins)
        return found.take(np.array([(found.rows == row).argmax() for row in arranged.rows], np.int64))

    def begin_trace(self, visitor: Visitor, budget: Budget | None = None) -> Trace:
        """Return the trace of a request that begins with what is known of the visitor."""
        return Trace(
            self.bundle.version,
            variant=self.variant,
            visitor_kind=visitor.kind,
            unknown_user=visitor.is_unknown_user,
            num_unknown_history_items=visitor.num_unknown_items,
            budget=budget or Budget(None),
            costs=self.costs,
            timings=[visitor.asked] if visitor.asked else [],
            degraded_stages=["history"] if visitor.is_degraded else [],
            started=time.perf_counter() - visitor.resolving_s,
        )


@dataclass(frozen=True)
class _Ask:
    """What a request asks of the rules."""

    policy: Policy
    request: Request
    purchases: Purchases = NO_PURCHASES
    explain: bool = False
    filtered: list[Filtered] = field(default_factory=list)  # filled where explain is


def _purchases(history: History) -> Purchases:
    bought = history.event_types == EVENT_CODE["purchase"]
    return Purchases(history.items[bought], history.timestamps[bought])


def check_settings(pipeline: Mapping[str, Any]) -> None:
    """Raise ValueError where nothing could be served with these settings.

    Args:
        pipeline: the fields of training.train.PipelineOptions, but for the policies; one that may be null may
            be missing.
    """
    for name, highest in {
        "num_candidates": MAX_CANDIDATES,
        "num_ranked": MAX_CANDIDATES,
        "default_limit": MAX_LIMIT,
        "num_neighbours": MAX_CANDIDATES,
    }.items():
        if not 1 <= pipeline[name] <= highest:
            raise ValueError(f"pipeline.{name} is {pipeline[name]}; expected 1 to {highest}")
    for name, weight in pipeline["event_weights"].items():
        if name not in EVENT_TYPES:
            raise ValueError(f"pipeline.event_weights names {name!r}; expected {choice(name, EVENT_TYPES)}")
        if not (is_number(weight) and weight >= 0):
            raise ValueError(f"pipeline.event_weights.{name} is {weight!r}; expected a number of at least 0")
    head_weights = pipeline.get("head_weights") or {}
    for name, weight in head_weights.items():
        if not (is_number(weight) and 0 <= weight <= MAX_HEAD_WEIGHT):
            raise ValueError(
                f"pipeline.head_weights.{name} is {weight!r}; expected a number from 0 to {MAX_HEAD_WEIGHT}"
            )
    if head_weights and not any(head_weights.values()):
        raise ValueError("pipeline.head_weights are all 0; expected at least one above")
    for name in ("graph_weight", "transition_weight"):
        counts = pipeline.get(name)
        if counts is not None and not (is_number(counts) and 0 <= counts <= MAX_SCORE_WEIGHT):
            raise ValueError(
                f"pipeline.{name} is {counts!r}; expected a number from 0 to {MAX_SCORE_WEIGHT}, or null"
            )
    for name in ("half_life_events", "half_life_days", "popular_window_days", "score_temperature"):
        length = pipeline.get(name)
        if length is not None and not (is_number(length) and length > 0):
            raise ValueError(f"pipeline.{name} is {length!r}; expected a number above 0, or null")
    check_sources(pipeline["sources"])


def default_head_weights(bundle: Bundle) -> NDArray[np.float32] | None:
    """Return how much each head of a bundle's ranker counts where no request says, [1, heads]; None for one.

    Raises:
        ValueError: the settings weigh a head that the ranker does not have.
    """
    weights = bundle.manifest["pipeline"].get("head_weights") or {}
    heads = bundle.scorer.heads if bundle.scorer else ()
    for name in weights:
        if name not in heads:
            raise ValueError(f"pipeline.head_weights names {name!r}; expected {choice(name, heads)}")
    if not heads:
        return None
    if not weights:
        return np.eye(1, len(heads), dtype=np.float32)
    return np.array([[weights.get(name, 0.0) for name in heads]], np.float32)


def transition_weight(bundle: Bundle, head_weights: NDArray[np.float32] | None) -> float:
    """Return how much it counts in the ranker's scores that an item has often come next; 0 for not at all.

    Args:
        bundle: whose settings say it for heads whose weights sum to 1.
        head_weights: [1, heads] that the scores are summed with, so that they grow alike; None for one head.
    """
    weight: float | None = bundle.manifest["pipeline"].get("transition_weight")
    if weight is None or bundle.transitions is None:
        return 0.0
    return weight if head_weights is None else weight * float(head_weights.sum())


def score_temperature(bundle: Bundle, head_weights: NDArray[np.float32] | None) -> float:
    """Return what a bundle divides its ranker's scores by, with what adds to them; 1 if it does not say.

    Args:
        bundle: whose settings say it for heads whose weights sum to 1.
        head_weights: [1, heads] that the scores are summed with; None for one head.
    """
    temperature: float | None = bundle.manifest["pipeline"].get("score_temperature")
    if temperature is None:
        return 1.0
    return temperature if head_weights is None else temperature * float(head_weights.sum())


def history_weights(bundle: Bundle, history: History) -> NDArray[np.float32]:
    """Return how much each event of `history.wanted` counts, [H'] float32: by its type and by its age.

    The age is counted in events behind it, and in days where the data has times; in neither where the data
    has no order at all.
    """
    return weights_by_settings(bundle.manifest["pipeline"], bundle.manifest["data"]["time"], history)


def weights_by_settings(settings: Mapping[str, Any], time_kind: str, history: History) -> NDArray[np.float32]:
    """Return what history_weights does, from a manifest's pipeline settings and its data's kind of times."""
    wanted = history.event_types != NEGATIVE_EVENT
    num_wanted = int(np.count_nonzero(wanted))
    half_lives = np.zeros(num_wanted)  # how many have passed
    if settings.get("half_life_events") is not None and time_kind != "none":
        half_lives += np.arange(num_wanted)[::-1] / settings["half_life_events"]
    if settings.get("half_life_days") is not None and time_kind == "unix":
        times = history.timestamps[wanted]
        ages = np.where(times > 0, times.max(initial=0) - times, 0)  # an event without a time is just now
        half_lives += ages / (DAY_MS * settings["half_life_days"])
    by_type = [float(settings["event_weights"].get(name, 1.0)) for name in EVENT_TYPES]
    return event_weights(history.event_types[wanted], half_lives, np.array(by_type, np.float32), 1.0)


def query_vector(bundle: Bundle, visitor: Visitor) -> NDArray[np.float32] | None:
    """Return the vector [D] to search with, folded in from the whole history; None where that is empty.

    The trained user vector is not asked: it knows the user as of the last training run, the history as of
    now, and on Amazon Beauty the history finds more (benchmarks/results/README.md).
    """
    weights = history_weights(bundle, visitor.history)
    folded = fold_in(bundle.item_vectors, bundle.item_degrees, visitor.history.wanted, weights)
    return folded if folded.any() else None


def _check_limit(limit: int) -> None:
    if limit < 1:
        raise ValueError(f"limit is {limit}; expected at least 1")
