"""embtab plan: the tables that fit a byte budget."""

from __future__ import annotations

import argparse
from pathlib import Path

from embtab.errors import UserError


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Arguments of embtab plan."""
    parser.add_argument("dir", type=Path, metavar="DIR", help="a dataset folder")
    parser.add_argument("--method", default="dense", help="name of a method (default %(default)s)")
    parser.add_argument("--budget", help='serving bytes: 8000000, "8MB", "8MiB" or "0.1x" of the dense tables')
    parser.add_argument("--dim", type=int, default=16, help="width of every embedding (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the hashes (default %(default)s)")
    parser.add_argument("--precision", help="of the served rows: fp32 (default, but auto chooses), fp16, int8 or int4")
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="of the method, such as op=sum; repeatable"
    )
    parser.add_argument("--all", action="store_true", help="every method at this budget, a line each")
    sharded = parser.add_argument_group("for machines one does not have")
    sharded.add_argument("--shards", type=int, metavar="N", help="also show how N devices would hold the tables")
    sharded.add_argument("--hbm", default="80GB", help="memory of a device (default %(default)s)")
    sharded.add_argument(
        "--sharding", default="auto", help="auto, table_wise, row_wise(_ids), column_wise or data_parallel"
    )
    sharded.add_argument(
        "--table-optimizer", default="rowwise_adagrad", help="sgd, adagrad or rowwise_adagrad (default %(default)s)"
    )
    parser.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace) -> None:
    from embtab.features import read_features
    from embtab.planning import plan
    from embtab.planning.overview import describe, outlooks
    from embtab.planning.specs import read_option

    options = dict(read_option(text) for text in arguments.option)
    features = read_features(arguments.dir)
    if arguments.all:
        if options or arguments.shards is not None:
            raise UserError("--all shows every method as it is: leave out --option and --shards")
        print(describe(outlooks(features, arguments.budget, arguments.dim, arguments.seed, arguments.precision)))
        return
    made = plan(
        features,
        arguments.method,
        arguments.budget,
        arguments.dim,
        arguments.seed,
        arguments.precision,
        **options,
    )
    print(made.describe())
    if arguments.shards is not None:
        from embtab.sharding.offline import describe_shards

        print(describe_shards(made, arguments.shards, arguments.hbm, arguments.sharding, arguments.table_optimizer))
