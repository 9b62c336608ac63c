"""Tree self-speculation: one forward drafts, one verifies many continuations of the text at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemodiff_train.decoding.generation import DecodingSettings, Generation
from nemodiff_train.decoding.linear import Draft, decode_linear
from nemodiff_train.decoding.path_distribution import PathDistribution, appended, initial_history
from nemodiff_train.decoding.sampling import TokenSampler
from nemodiff_train.decoding.session import Session, TokenLayout


def decode_tree(session: Session, prompts: Sequence[Sequence[int]], sampler: TokenSampler) -> list[Generation]:
    """Draft as :func:`~nemodiff_train.decoding.linear.decode_linear` does; verify the most probable continuations.

    They are a tree: its root is the last known token, and every other node a token for the position after its
    parent's.  One forward lets each node see its ancestors (as in SpecInfer, arXiv 2305.09781), and the verifier
    chooses the token that follows each.  The text goes on from the root as long as that token is one of the node's
    children.  Every token is the verifier's own choice, so that at temperature 0 the output equals AR decoding's, and
    above it is distributed as that: this is rejection sampling of a draft that is certain of what it proposes.

    Args:
        session: One row per prompt, nothing committed.
        prompts: Token ids of each prompt.
        sampler: Chooses tokens; its settings give block size, number of nodes, and candidates per position.

    Returns:
        One generation per prompt.
    """
    return decode_linear(session, prompts, sampler, _verify_tree)


NextLogProbs = Callable[[int, Tensor], Tensor]
"""Takes the index of a drafted position and histories [batch, n, HISTORY]; returns log probabilities [batch, n or 1,
width] of its candidates."""


@dataclass(frozen=True)
class DraftTree:
    """One tree per row, of n nodes; parents come before their children, and the root is first."""

    tokens: Tensor
    """[batch, n] token of each node; the root's is not set."""
    parents: Tensor
    """[batch, n] index of each node's parent; the root is its own."""
    depths: Tensor
    """[batch, n] distance from the root."""

    @classmethod
    def most_probable(cls, next_log_probs: NextLogProbs, candidates: Tensor, last: Tensor, nodes: int) -> "DraftTree":
        """Return the trees whose nodes have the largest products of probabilities from the root.

        Args:
            next_log_probs: Of the candidates at a drafted position, given the tokens before.
            candidates: [batch, k, width] token ids.
            last: [batch, 1] the known token before the draft.
            nodes: Maximum number of nodes, the root included.
        """
        root, width = torch.zeros_like(last), candidates.shape[-1]
        # Mass, token and parent of each node, by level.
        levels = [(torch.zeros_like(last, dtype=torch.float32), root, root)]
        first, total = 0, 1  # index of the last level's first node, and of the first after it
        histories = initial_history(last)  # of what follows each node of the last level
        for depth, tokens in enumerate(candidates.unbind(1)):
            # The children of a level's nodes, the most probable first; of equal ones, those of earlier nodes.
            masses = (levels[-1][0][:, :, None] + next_log_probs(depth, histories)).flatten(1)
            masses, order = masses.sort(dim=-1, descending=True, stable=True)
            masses, order = masses[:, : nodes - 1], order[:, : nodes - 1]
            parents, tokens = order // width, tokens.gather(1, order % width)
            levels.append((masses, tokens, first + parents))
            histories = histories.gather(1, parents[..., None].expand(-1, -1, histories.shape[-1]))
            histories = appended(histories, tokens)
            first, total = total, total + order.shape[1]
        mass, tokens, parents = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
        depths = torch.cat([torch.full_like(level[1], depth) for depth, level in enumerate(levels)], dim=1)
        # A node's mass is at most its parent's, which comes first: of the largest, no node is without its parent.
        kept = mass.sort(dim=-1, descending=True, stable=True).indices[:, :nodes].sort(dim=-1).values
        new = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
        index = torch.zeros_like(parents).scatter(1, kept, new)  # [batch, all nodes] index among the chosen
        return cls(tokens.gather(1, kept), index.gather(1, parents.gather(1, kept)), depths.gather(1, kept))

    def ancestors(self) -> Tensor:
        """Return [batch, n, n] whether the node of the last axis is an ancestor of a node, or that node."""
        size = self.parents.shape[1]
        # Start from each node and its parent; each product of the matrix with itself doubles the distance.
        reaches = torch.eye(size, device=self.parents.device).repeat(len(self.parents), 1, 1)
        reaches.scatter_(2, self.parents[..., None], 1.0)
        for _ in range((size - 1).bit_length()):
            reaches = (reaches @ reaches).clamp(max=1)
        return reaches.bool()


def _verify_tree(
    session: Session, rows: list[Generation], active: Tensor, last: Tensor, draft: Draft, sampler: TokenSampler
) -> Tensor:
    """Verify the most probable continuations and keep the branch that the verifier follows."""
    settings, length = sampler.settings, draft.logits.shape[1]
    tree = DraftTree.most_probable(*_candidates(session, draft, settings), last, settings.tree_nodes)
    tokens, can_attend = torch.cat([last, tree.tokens[:, 1:]], dim=1), tree.ancestors()
    logits = session.forward(tokens, active, "verify", layout=TokenLayout(tree.depths, can_attend, length + 1))
    choices = sampler.sample_tokens(logits, active)  # [batch, n] what follows each node
    # A node is on the branch if it and all its ancestors are what the verifier has chosen after their parents.
    matches = choices.gather(1, tree.parents) == tokens  # [batch, n]
    matches[:, 0] = True
    on_branch = ~(can_attend & ~matches[:, None, :]).any(-1)
    proposed = _mass_of_children(logits, tokens, tree.parents)

    branches = []
    on_host = torch.stack([on_branch.long(), tokens, tree.parents, choices]).cpu()  # each copy is a wait
    for index, (row, mass) in enumerate(zip(active.tolist(), proposed.tolist(), strict=True)):
        branches.append(on_host[0, index].nonzero()[:, 0])
        branch, (token_of, parent_of, choice_after) = branches[-1].tolist(), on_host[1:, index].tolist()
        # The draft of the record is the branch and, where it ends at a node with children, the first of these.
        children = [node for node in range(1, len(parent_of)) if parent_of[node] == branch[-1]]
        drafted = branch[1:] + children[:1]
        rows[row].extend_by_cycle(
            [*(token_of[node] for node in branch[1:]), choice_after[branch[-1]]],
            session.calls(row),
            draft_tokens=[token_of[node] for node in drafted],
            accept_mask=[node in branch for node in drafted],
            accept_probs=[mass[parent_of[node]] for node in drafted],
            target_tokens=session.draft_kind.target_tokens_per_cycle - 1,  # less what follows the branch
        )
    session.commit_nodes(active, branches)
    ends = torch.stack([branch[-1:] for branch in branches])
    return choices.gather(1, session.cache.to_device(ends))


def _candidates(session: Session, draft: Draft, settings: DecodingSettings) -> tuple[NextLogProbs, Tensor]:
    """Return what a draft says of candidates, and their ids [batch, k, width]."""
    width, temperature = min(settings.tree_width, settings.tree_nodes - 1), settings.temperature or 1.0
    if session.selector_tables is None:
        log_probs = (draft.logits / temperature).log_softmax(-1)
        values, candidates = log_probs.topk(min(width, log_probs.shape[-1]), dim=-1)
        return lambda depth, histories: values[:, depth, None], candidates  # the same after every history
    paths = PathDistribution.from_draft(session.selector_tables, *draft)
    return (
        lambda depth, histories: (paths.logits(depth, histories) / temperature).log_softmax(-1)[..., :width],
        paths.candidates[..., :width],
    )


def _mass_of_children(logits: Tensor, tokens: Tensor, parents: Tensor) -> Tensor:
    """Return [batch, n] the probability, at temperature 1, that what follows a node is one of its children."""
    # [batch, n] the probability of each node's token after its parent.
    normalizers = logits.logsumexp(-1).gather(1, parents)
    of_node = logits.flatten(1).gather(1, parents * logits.shape[-1] + tokens)
    probs = (of_node - normalizers).exp()
    probs[:, 0] = 0.0  # the root is nobody's child
    return torch.zeros_like(probs).scatter_add(1, parents, probs)
