"""`trirank explain`: the funnel of one request, and why the first fifty stand where they do.

Asks a running server, or answers from a bundle by itself, with policies that are not served yet:

    trirank explain --user 17
    trirank explain --user 17 --bundle bundles --policies draft.yaml --policy home
"""

from __future__ import annotations

from pathlib import Path

from google.protobuf.json_format import MessageToDict
from rich.table import Table
from rich.text import Text

from engine.arguments import ArgumentParser
from engine.bundle import Bundle, resolve_bundle
from engine.commands import (
    add_client_arguments,
    add_recommend_arguments,
    ask,
    moves_of,
    recommend_arguments,
    stderr,
    stdout,
    timings_table,
)
from engine.deadline import Budget
from engine.pipeline import RecommendationPipeline
from engine.policy_files import PolicyFiles
from engine.server import recommend
from protos.trirank.v1 import recommender_pb2 as pb

NUM_ITEMS = 50


def main(argv: list[str]) -> int:
    """Run `trirank explain`; return 0 done, 1 the server failed, 2 what was asked for is wrong, 3 the server
    does not answer.
    """
    parser = ArgumentParser(prog="trirank explain", description=__doc__)
    add_recommend_arguments(parser)
    parser.add_argument(
        "--bundle",
        type=Path | None,
        default=None,
        help="answer from this bundle, or the newest in this directory, without a server",
    )
    parser.add_argument(
        "--policies",
        type=Path | None,
        default=None,
        help="with --bundle: policies instead of its own, a YAML file or a directory of such files",
    )
    add_client_arguments(parser)
    parser.set_defaults({"limit": NUM_ITEMS})
    args = parser.parse_args(argv)
    try:
        question = recommend_arguments(args) | {"explain": True}
        if args.bundle is None:
            if args.policies is not None:
                raise ValueError("policies is given without --bundle; a server has policies of its own")
            return ask(args, lambda client: client.recommend(**question), show)
        bundle = Bundle.load(resolve_bundle(args.bundle))
        policies = PolicyFiles(args.policies).load() if args.policies else None
        pipeline = RecommendationPipeline(bundle, policies)
        response, _ = recommend(pipeline, pb.RecommendRequest(**question), Budget(None))
    except (ValueError, OSError) as error:
        stderr.print(f"error: {error}", markup=False)
        return 2
    if args.json:
        stdout.print_json(data=MessageToDict(response, preserving_proto_field_name=True))
    else:
        show(response)
    return 0


def show(response: pb.RecommendResponse) -> None:
    """Print the stages, the rules, and every item with its way through them."""
    arrangement = response.arrangement
    stdout.print(timings_table(response.trace))

    rules = Table("hard filter", "items in", "items out", title=f"policy {arrangement.policy}")
    for one in arrangement.filters:
        name = "the request's own filters" if one.rule == "request" else one.rule
        rules.add_row(Text(name), f"{one.num_in:,}", f"{one.num_out:,}")
    stdout.print(rules)
    if arrangement.rules:
        effects = Table("rule", "came in", "went out", "moved", "places it gave way")
        for effect in arrangement.rules:
            counts = (effect.num_entered, effect.num_left, effect.num_moved, effect.num_yielded)
            effects.add_row(Text(effect.rule), *map(str, counts))
        stdout.print(effects)

    stdout.print(_items("the slate", list(enumerate(response.items, start=1))))
    if arrangement.displaced:
        title = "not on the slate, and there without rules"
        stdout.print(_items(title, [(None, item) for item in arrangement.displaced]))
    if arrangement.exposure:
        shares = Table("rule", "exposure of", "due", "given")
        for share in arrangement.exposure:
            shares.add_row(
                Text(share.rule), Text(share.group or "(none)"), f"{share.due:.1%}", f"{share.given:.1%}"
            )
        stdout.print(shares)
    notes = [f"seed {arrangement.seed}"]
    if arrangement.HasField("now_ms"):
        notes.append(f"now_ms {arrangement.now_ms}")
    if response.trace.degraded_stages:
        notes.append(f"degraded stages {', '.join(response.trace.degraded_stages)}")
    if response.trace.relaxed_rules:
        notes.append(f"rules that gave way {', '.join(response.trace.relaxed_rules)}")
    stdout.print("; ".join(notes), markup=False)


def _items(title: str, items: list[tuple[int | None, pb.ScoredItem]]) -> Table:
    table = Table(
        "",
        "item",
        "title",
        "source",
        "retrieved",
        "ranked",
        "score",
        "of it transitions",
        "relevance",
        "moves: rule, from > to",
        title=title,
        title_justify="left",
    )
    for place, item in items:
        reasons = item.reasons
        relevance = f"{reasons.relevance:.3f}"
        if abs(reasons.adjusted_relevance - reasons.relevance) > 5e-4:
            relevance += f" > {reasons.adjusted_relevance:.3f}"
        table.add_row(
            "" if place is None else str(place),
            Text(item.item_id),
            Text(item.title),
            item.source,
            str(reasons.retrieval_place) if reasons.HasField("retrieval_place") else "",
            str(reasons.ranking_place) if reasons.HasField("ranking_place") else "",
            f"{reasons.ranking_score:.4g}" if reasons.HasField("ranking_score") else "",
            f"{reasons.transition_score:.3g}" if reasons.transition_score else "",
            relevance,
            Text(moves_of(item)),
        )
    return table
