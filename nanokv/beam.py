"""Beam search: of several continuations at a time, the likeliest ones go on (no paper; the rules are those of transformers).

All beams are rows of one compressed cache. After a step a row may continue another row's text, so the cache's rows change
places, and one may be copied over another (`Session.reorder`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from nanokv.engine import Session
from nanokv.text.sampler import finite


@torch.inference_mode()
def search(
    session: Session,
    logits: Tensor,
    n: int,
    ends: Collection[int],
    length_penalty: float = 1.0,
    interrupted: Callable[[], bool] = lambda: False,
) -> list[tuple[float, list[int]]]:
    """The best texts of at most n tokens as (score, token ids), the best first; as many as the session has rows.

    session     its rows are copies of one prompt, which `logits` (B,vocab) follow.
    ends        token ids that end a text; they are part of it.
    The score   is the sum of the tokens' log-probabilities, divided by length ** length_penalty.
    interrupted is asked after each step; if it says so, the texts so far count as finished.
    """
    beams, device = len(session.seen), session.pos.device
    finished: list[tuple[float, list[int]]] = []
    running: list[tuple[float, list[int]]] = [(0.0, [])]  # sum of log-probabilities, and the tokens
    for length in range(1, n + 1):
        rows = len(running)  # one at first, as all rows are the same
        score = finite(logits)[:rows].float().log_softmax(-1) + torch.tensor([[s] for s, _ in running], device=device)
        # enough for all rows to go on, even if every row's best tokens end its text
        best = score.flatten().topk(min(beams * (1 + max(1, len(ends))), score.numel()))
        source, tokens = best.indices // score.shape[1], best.indices % score.shape[1]
        is_last, going, parents = length == n or interrupted(), [], []
        for rank, (total, row, token) in enumerate(
            zip(*(x.tolist() for x in (best.values, source, tokens)), strict=True)
        ):
            text = [*running[row][1], token]
            if token not in ends and not is_last:
                going.append((total, text))
                parents.append(row)
            elif rank < beams:
                finished.append((total / length**length_penalty, text))
        finished = sorted(finished, key=lambda x: -x[0])[:beams]
        running, parents = going[:beams], parents[:beams]
        full = len(finished) == beams
        if is_last or (full and running[0][0] / length**length_penalty <= finished[-1][0]):
            break
        session.reorder(parents)
        logits = session.feed(torch.tensor([[text[-1]] for _, text in running], device=device))
    return finished
