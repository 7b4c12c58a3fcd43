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

from lillama.model.work import Work
from lillama.stream.activations import ActivationPlacement, ActivationStore, StoreFactory
from lillama.stream.batch import Batch
from lillama.stream.calls import BlockInputs
from lillama.stream.capture import finish, overflow, row_slices
from lillama.stream.draw import draw
from lillama.stream.forward import through
from lillama.stream.model import StreamedModel
from lillama.system.memory import LOGIT_BYTES_IN_TRAINING, tokens_of_logits

LOGITS = 5  # (tokens x vocabulary) matrices in memory together
NO_LABEL = -100
LEAST_LENGTH = 1e-6  # of an output that is next to nothing


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

    A model without a language-modelling head predicts nothing. Its last outputs are then taken for means of Gaussians, of as
    much variance as the original's output has in all: the divergence is half of the squared error relative to the output's
    own square, and there is no cross-entropy.

    Attributes:
        model: the original.
        outside: from `model.outside(head=True)`.
        calls: of the last stack, from `begin`.
        logit_bytes: largest (tokens x vocabulary) matrix.
    """

    model: StreamedModel
    outside: PreTrainedModel
    calls: BlockInputs
    logit_bytes: int = LOGIT_BYTES_IN_TRAINING

    def compare(
        self,
        batch: Batch,
        own: Float[Tensor, "sequences length width"],
        teacher: Float[Tensor, "sequences length width"],
        weights: tuple[float, float] | None,
    ) -> Compared:
        """Compare the predictions from two sets of outputs at the real tokens.

        Args:
            batch: the sequences.
            own: the compressed model's last outputs.
            teacher: the original's.
            weights: of divergence and cross-entropy in what the gradient is of; None computes no gradient.
        """
        place, tokens, labels = self._real(batch, own)
        sums, gradients, size = torch.zeros(2, device=own.device), [], self._tokens(own.shape[1])
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
        self, batch: Batch, hidden: Float[Tensor, "sequences length width"], generator: torch.Generator
    ) -> Float[Tensor, "sequences length width"]:
        """Return the gradient of each real token's log-loss by the last block's outputs, for labels that are sampled.

        The labels come from the model's own distribution, so that second moments of what is returned are Fisher information.

        Args:
            batch: the sequences.
            hidden: the last block's outputs.
            generator: of the labels, on the CPU.

        Raises:
            ModelError: predictions are not finite.
        """
        place, tokens, _ = self._real(batch, hidden)
        size, gradients = self._tokens(hidden.shape[1]), []
        for ids, part in zip(tokens.split(size), hidden[place].split(size), strict=True):
            if not self.predicts:
                noise = torch.randn(part.shape, generator=generator).to(part.device, part.dtype)
                gradients.append(noise / part.norm(dim=-1, keepdim=True).clamp_min(LEAST_LENGTH))
                continue
            leaf = part.detach().requires_grad_()
            with torch.enable_grad():
                found = self._log_probabilities(ids, leaf)
            chances = found.detach().exp()
            if not chances.isfinite().all():
                raise overflow("what the head predicts", self.model.dtype)
            chosen = draw(chances, torch.rand(len(chances), generator=generator).to(found.device))
            gradients += torch.autograd.grad(-found.gather(1, chosen).sum(), [leaf])
        whole = torch.zeros_like(hidden)
        whole[place] = torch.cat(gradients)
        return whole

    def means(
        self, batch: Batch, own: ActivationStore, teacher: ActivationStore, micro_batch: int
    ) -> tuple[float, float]:
        """Return divergence and cross-entropy, in nats a token, of the predictions from two stores of last outputs.

        Where the text itself has nothing to be predicted, the cross-entropy is that of what the original predicts, above its
        own: the divergence again.
        """
        sums, tokens, labelled = torch.zeros(2, dtype=torch.float64), 0, 0
        for rows in row_slices(len(batch), micro_batch):
            some = batch[rows]
            sums += self.compare(some, own.read(rows), teacher.read(rows), None).sums.cpu().double()
            counts = self.counts(some, own.shape[1])
            tokens, labelled = tokens + counts[0], labelled + counts[1]
        divergence = float(sums[0]) / max(1, tokens)
        return divergence, float(sums[1]) / labelled if labelled else divergence

    @property
    def predicts(self) -> bool:
        """Whether the model has a language-modelling head."""
        return self.model.kind.predicts != "nothing"

    def counts(self, batch: Batch, length: int) -> tuple[int, int]:
        """Return the real tokens of some sequences, and how many of them have a next one to be predicted."""
        mask = self._mask(batch)
        tokens = len(batch) * length if mask is None else int(mask.sum())
        return tokens, 0 if batch.ids is None else int((self._labels(batch.ids, mask) != NO_LABEL).sum())

    def _real(self, batch: Batch, hidden: Float[Tensor, "sequences length width"]) -> tuple[Tensor, Tensor, Tensor]:
        """Return where the real tokens are, what they are, and what follows each."""
        mask, shape = self._mask(batch), hidden.shape[:2]
        ids = torch.zeros(shape, dtype=torch.long) if batch.ids is None else batch.ids
        place = torch.ones(shape, dtype=torch.bool) if mask is None else mask
        return place.to(hidden.device), ids[place], self._labels(ids, mask)[place].to(hidden.device)

    def _mask(self, batch: Batch) -> Tensor | None:
        return batch.masks.get(len(self.model.stacks) - 1)

    def _labels(self, ids: Int[Tensor, "sequences length"], mask: Bool[Tensor, "sequences length"] | None) -> Tensor:
        """Return for every token the one that follows it; none where the model fills gaps instead of going on."""
        return torch.full_like(ids, NO_LABEL) if self.model.kind.predicts == "masked" else next_tokens(ids, mask)

    def _tokens(self, length: int) -> int:
        """Return how many tokens are taken at once."""
        if not self.predicts:
            return length
        return min(length, tokens_of_logits(self.outside.config.get_text_config().vocab_size, self.logit_bytes))

    def _compare(
        self,
        ids: Int[Tensor, " tokens"],
        labels: Int[Tensor, " tokens"],
        own: Float[Tensor, "tokens width"],
        teacher: Float[Tensor, "tokens width"],
        weights: tuple[float, float] | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the two sums over a few tokens, and the gradient, which is 0 if it is not wanted."""
        leaf = own.detach().requires_grad_(weights is not None)
        with torch.set_grad_enabled(weights is not None):
            divergence, entropy = self._distances(ids, labels, leaf, teacher)
            if weights is not None:
                (weights[0] * divergence + weights[1] * entropy).backward()
        gradient = torch.zeros_like(own) if leaf.grad is None else leaf.grad
        return torch.stack([divergence, entropy]).detach(), gradient

    def _distances(
        self,
        ids: Int[Tensor, " tokens"],
        labels: Int[Tensor, " tokens"],
        own: Float[Tensor, "tokens width"],
        teacher: Float[Tensor, "tokens width"],
    ) -> tuple[Tensor, Tensor]:
        if not self.predicts:
            apart = (own.float() - teacher.float()).square().sum(dim=-1)
            variance = teacher.float().square().sum(dim=-1).clamp_min(LEAST_LENGTH**2)
            return (apart / variance / 2).sum(), own.new_zeros((), dtype=torch.float32)
        with torch.no_grad():
            wanted = self._log_probabilities(ids, teacher)
        found = self._log_probabilities(ids, own)
        return (
            F.kl_div(found, wanted, reduction="sum", log_target=True),
            F.nll_loss(found, labels, reduction="sum", ignore_index=NO_LABEL),
        )

    def _log_probabilities(
        self, ids: Int[Tensor, " tokens"], hidden: Float[Tensor, "tokens width"]
    ) -> Float[Tensor, "tokens vocabulary"]:
        """Return the logarithms of the next token's chances; each token passes as a sequence of its own."""
        logits = finish(self.model, self.outside, self.calls, ids[:, None], hidden[:, None])
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


def head_bytes(work: Work) -> int:
    """Return the bytes that the head and its logits take, from shapes alone."""
    logits = 4 * work.seq_len * (work.head_params // work.spec.hidden_size)
    return work.head_params * work.itemsize + LOGITS * min(LOGIT_BYTES_IN_TRAINING, logits)


@torch.no_grad()
def change(
    original: StreamedModel, compressed: StreamedModel, batch: Batch, placement: ActivationPlacement, micro_batch: int
) -> Change:
    """Run some sequences through a model and its compressed form, block by block, and compare the predictions."""
    stores = [StoreFactory(placement, original.dtype, f"change-{name}", 2) for name in ("original", "own")]
    (calls, ends), (own_calls, own_ends) = (
        through(model, batch, new, micro_batch) for model, new in zip((original, compressed), stores, strict=True)
    )
    head = Head(original, original.outside(head=True), calls[-1])
    before = head.means(batch, ends[-1], ends[-1], micro_batch)
    kl, entropy = head.means(batch, own_ends[-1], ends[-1], micro_batch)
    for made in (*stores, *calls, *own_calls):
        made.remove()
    return Change(kl, entropy - before[1])
