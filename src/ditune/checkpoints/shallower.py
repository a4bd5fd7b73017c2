"""A network with fewer blocks, to begin a student that is distilled. Which blocks stay is a choice of ours."""

import re

from ditune.errors import UserError
from ditune.networks.dit import DiT


def kept_blocks(blocks: int, depth: int) -> list[int]:
    """Numbers of `depth` blocks of `blocks`, evenly spaced, the first and the last among them.

    Raises:
        UserError: `depth` is not between 1 and the number of blocks.
    """
    if not 1 <= depth <= blocks:
        raise UserError(f"depth is {depth}, and the network has {blocks} blocks. Set it to 1 to {blocks}.")
    return [round(i * (blocks - 1) / max(depth - 1, 1)) for i in range(depth)]


def shallower(network: DiT, depth: int) -> DiT:
    """The network of `depth` of its blocks, with copies of all weights. With all blocks it has the same function.

    Args:
        network: a plain DiT or DiT-MoE.
        depth: blocks that stay, see `kept_blocks`.

    Raises:
        UserError: there are not so many blocks; or the blocks that stay have experts at other places than a network of
            this depth.
    """
    places = {old: new for new, old in enumerate(kept_blocks(len(network.blocks), depth))}
    state = {}
    for name, value in network.state_dict().items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if block is None:
            state[name] = value
        elif int(block[1]) in places:
            state[f"blocks.{places[int(block[1])]}.{block[2]}"] = value
    made = type(network)(**(network.config | {"depth": depth}))
    if made.state_dict().keys() != state.keys():
        raise UserError(f"depth is {depth}, and then blocks with and without experts would change places. Set another.")
    made.load_state_dict(state)
    return made.train(network.training)
