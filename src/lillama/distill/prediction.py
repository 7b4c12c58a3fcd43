"""What the head makes of the last block's outputs, compared with what it makes of the original's.

Original and compressed model share all that comes after the blocks, and it works token by token. The outputs of the real
tokens are therefore taken a few at a time, and the (tokens x vocabulary) matrices stay small whatever the batch.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from lillama.stream.calls import CallTable
from lillama.stream.store import ActivationStore, Shelf
from lillama.stream.streamed import StreamedModel, advance, begin, finish, row_slices

LOGIT_BYTES = 64 << 20  # of one (tokens x vocabulary) matrix in fp32; some five of them are in memory together
NO_LABEL = -100


@dataclass(frozen=True)
class Compared:
    """The predictions for some sequences, compared.

    Attributes:
        sums: divergence and cross-entropy, summed over their tokens.
        gradient: of the weighted sum with respect to the compressed model's last outputs; None if not asked for.
    """

    sums: Float[Tensor, "2"]
    gradient: Float[Tensor, "sequences length width"] | None


@dataclass(frozen=True)
class Head:
    """What comes after the blocks.

    Attributes:
        model: the original.
        outside: from `model.outside(head=True)`.
        calls: from `begin`.
        logit_bytes: largest (tokens x vocabulary) matrix.
    """

    model: StreamedModel
    outside: PreTrainedModel
    calls: CallTable
    logit_bytes: int = LOGIT_BYTES

    def compare(
        self,
        ids: Int[Tensor, "sequences length"],
        mask: Bool[Tensor, "sequences length"] | None,
        own: Float[Tensor, "sequences length width"],
        teacher: Float[Tensor, "sequences length width"],
        weights: tuple[float, float] | None,
    ) -> Compared:
        """Compare the predictions from two sets of outputs at the real tokens.

        Args:
            ids: the sequences' token ids.
            mask: true at real tokens; None if all are.
            own: the compressed model's last outputs.
            teacher: the original's.
            weights: of divergence and cross-entropy in what the gradient is of; None computes no gradient.
        """
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        labels = next_tokens(ids, mask)[real].to(own.device)
        tokens, place = ids[real], real.to(own.device)
        sums, gradients, size = torch.zeros(2, device=own.device), [], self._tokens(ids)
        parts = (tokens.split(size), labels.split(size), own[place].split(size), teacher[place].split(size))
        for part in zip(*parts, strict=True):
            found, gradient = self._compare(*part, weights)
            sums += found
            gradients.append(gradient)
        if weights is None:
            return Compared(sums, None)
        whole = torch.zeros_like(own)
        whole[place] = torch.cat(gradients)
        return Compared(sums, whole)

    def score(
        self,
        ids: Int[Tensor, "sequences length"],
        mask: Bool[Tensor, "sequences length"] | None,
        hidden: Float[Tensor, "sequences length width"],
        generator: torch.Generator,
    ) -> Float[Tensor, "sequences length width"]:
        """Return the gradient of each real token's log-loss by the last block's outputs, for labels that are sampled.

        The labels come from the model's own distribution, so that second moments of what is returned are Fisher information.

        Args:
            ids: the sequences' token ids.
            mask: true at real tokens; None if all are.
            hidden: the last block's outputs.
            generator: of the labels, on the CPU.
        """
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        place, size, gradients = real.to(hidden.device), self._tokens(ids), []
        for tokens, part in zip(ids[real].split(size), hidden[place].split(size), strict=True):
            leaf = part.detach().requires_grad_()
            with torch.enable_grad():
                found = self._log_probabilities(tokens, leaf)
            chosen = torch.multinomial(found.detach().exp().cpu(), 1, generator=generator).to(found.device)
            gradients += torch.autograd.grad(-found.gather(1, chosen).sum(), [leaf])
        whole = torch.zeros_like(hidden)
        whole[place] = torch.cat(gradients)
        return whole

    def means(
        self,
        ids: Int[Tensor, "sequences length"],
        mask: Bool[Tensor, "sequences length"] | None,
        own: ActivationStore,
        teacher: ActivationStore,
        micro_batch: int,
    ) -> tuple[float, float]:
        """Return divergence and cross-entropy, in nats a token, of the predictions from two stores of last outputs."""
        sums, tokens, labelled = torch.zeros(2, dtype=torch.float64), 0, 0
        for rows in row_slices(len(ids), micro_batch):
            some = None if mask is None else mask[rows]
            sums += self.compare(ids[rows], some, own.read(rows), teacher.read(rows), None).sums.cpu().double()
            tokens += ids[rows].numel() if some is None else int(some.sum())
            labelled += int((next_tokens(ids[rows], some) != NO_LABEL).sum())
        return float(sums[0]) / max(1, tokens), float(sums[1]) / max(1, labelled)

    def _tokens(self, ids: Tensor) -> int:
        """Return how many tokens are taken at once."""
        return max(1, min(ids.shape[1], self.logit_bytes // (4 * self.outside.config.get_text_config().vocab_size)))

    def _compare(
        self, ids: Tensor, labels: Tensor, own: Tensor, teacher: Tensor, weights: tuple[float, float] | None
    ) -> tuple[Tensor, Tensor]:
        """Return the two sums over a few tokens, and the gradient, which is 0 if it is not wanted."""
        with torch.no_grad():
            wanted = self._log_probabilities(ids, teacher)
        leaf = own.detach().requires_grad_(weights is not None)
        with torch.set_grad_enabled(weights is not None):
            found = self._log_probabilities(ids, leaf)
            divergence = F.kl_div(found, wanted, reduction="sum", log_target=True)
            entropy = F.nll_loss(found, labels, reduction="sum", ignore_index=NO_LABEL)
            if weights is not None:
                (weights[0] * divergence + weights[1] * entropy).backward()
        gradient = torch.zeros_like(own) if leaf.grad is None else leaf.grad
        return torch.stack([divergence, entropy]).detach(), gradient

    def _log_probabilities(self, ids: Tensor, hidden: Tensor) -> Float[Tensor, "tokens vocabulary"]:
        """Return the logarithms of the next token's chances; each token passes as a sequence of its own."""
        logits = finish(self.model, self.outside, self.calls, ids[:, None], None, hidden[:, None])
        return F.log_softmax(logits[:, 0].float(), dim=-1)


def next_tokens(
    ids: Int[Tensor, "sequences length"], mask: Bool[Tensor, "sequences length"] | None
) -> Int[Tensor, "sequences length"]:
    """Return for every token the one that follows it in its sequence, `NO_LABEL` where that is none or padding."""
    labels = torch.full_like(ids, NO_LABEL)
    labels[:, :-1] = ids[:, 1:]
    if mask is not None:
        labels[:, :-1][~mask[:, 1:]] = NO_LABEL
    return labels


@dataclass(frozen=True)
class Change:
    """What compression did to the predictions on some sequences.

    Attributes:
        kl: divergence from the original's, in nats a token.
        rise: of the text's own cross-entropy, in nats a token.
    """

    kl: float
    rise: float


@torch.no_grad()
def change(
    original: StreamedModel,
    compressed: StreamedModel,
    ids: Int[Tensor, "sequences length"],
    mask: Bool[Tensor, "sequences length"] | None,
    shelf: Shelf,
    micro_batch: int,
) -> Change:
    """Run some sequences through a model and its compressed form, block by block, and compare the predictions."""
    shape = (*ids.shape, original.skeleton.config.get_text_config().hidden_size)
    place = shelf.place(2 * torch.Size(shape).numel() * original.dtype.itemsize)
    stores = [ActivationStore(shape, original.dtype, shelf, place, f"change-{name}") for name in ("original", "own")]
    calls = []
    for model, store in zip((original, compressed), stores, strict=True):
        calls.append(begin(model, ids, mask, store, micro_batch))
        for index in range(len(model.blocks)):
            advance(model.block(index), index, calls[-1], store, store, micro_batch)
    head = Head(original, original.outside(head=True), calls[0])
    before = head.means(ids, mask, stores[0], stores[0], micro_batch)
    kl, entropy = head.means(ids, mask, stores[1], stores[0], micro_batch)
    for store in stores:
        store.remove()
    return Change(kl, entropy - before[1])
