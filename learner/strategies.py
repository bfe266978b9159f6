"""The strategies by name: what each adds to the one training loop, and what it hands on to the next run.

Avalanche is built for one process that sees all experiences; here each experience is a process. So a strategy is
split in what can be written down and put back (`learner.training.TrainingState`) and what is made anew in each
run. Avalanche's parts are used where they allow that:

============  ==============================================================================================
replay        `ReplayPlugin`, over a memory that the replay store chose
ewc, mas      `EWCPlugin.compute_importances` and `MASPlugin._get_importance`; what they keep in attributes, by
              the number of the experience, is `Anchored`'s to keep
si            our own: Avalanche's keeps views of the weights, so on a CPU old and new are the same tensor, the
              path is zero, and no weight is ever held
lwf           `LwFPlugin`, whose teacher is a table and not a copy of the network
der           our own loss: `DER` keeps its own buffer and logits, and these cannot grow with the head
er_ace        our own loss: `ACECriterion` takes the logarithm of a softmax, which is NaN once two logits lie
              100 apart; `ER_ACE` replays nothing in a process's first experience
agem          `AGEMPlugin`, once an update: it clears gradients, so it would undo accumulated ones; and not where
              the memory's gradient has vanished, which it divides by
gdumb         in `learner.training`: `GDumbPlugin` keeps the starting weights in an attribute, and puts another
              network in the place of ours
============  ==============================================================================================

Every batch is (inputs, targets, rows): the row's number finds what the old network said of it, and tells whether
the example is new or comes from the memory. ::

    row    0 .. n-1 new      n .. n+m-1 memory      from n+m on: new ones again, in ER-ACE's memory
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from avalanche.benchmarks.utils.classification_dataset import ClassificationDataset
from avalanche.benchmarks.utils.data_loader import GroupBalancedInfiniteDataLoader
from avalanche.training.plugins import AGEMPlugin, EWCPlugin, LwFPlugin, MASPlugin, ReplayPlugin, SupervisedPlugin
from avalanche.training.storage_policy import ExemplarsBuffer
from avalanche.training.templates import SupervisedTemplate
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from learner.finetune import FineTuneSettings

MAX_GRADIENT_NORM = 1.0
VANISHED = 1e-36
"""A square below this is near the smallest number that float32 holds in full."""
LORA = "default"
"""The name that peft gives to its only adapter."""

Named = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Logits (B, C), targets (B,) and rows (B,) to a scalar."""


@dataclass
class Strategy:
    """What a strategy brings into one run.

    Args:
        plugins: for Avalanche, in this order, after all others.
        loss: of a batch, before the plugins add theirs.
        anchored: holds the weights; its `importances` and `anchors` are the next run's. None where nothing is held.
        added: for each batch what penalty or distillation added to the loss.
    """

    plugins: list[SupervisedPlugin] = field(default_factory=list)
    loss: Loss = lambda logits, targets, rows: nn.functional.cross_entropy(logits, targets)
    anchored: Anchored | None = None
    added: list[float] = field(default_factory=list)


def strategy_of(
    settings: FineTuneSettings,
    net: nn.Module,
    importances: Named,
    anchors: Named,
    experience: int,
    memory: ClassificationDataset | None,
    old_logits: Tensor | None,
) -> Strategy:
    """The strategy that `settings` names, for this run.

    Args:
        net: what is trained, with its LoRA layers where it has any.
        importances: of the runs before, by the weight's name; empty in a first run.
        anchors: likewise.
        experience: n, how many examples are new: rows from n on are the memory's.
        memory: what to replay, if the strategy does and there is any.
        old_logits: (n + m, K) of the network as it was before this run, for the K classes that it knew; None
            in a first run.
    """
    made = Strategy()
    name = settings.strategy.removesuffix("_replay")
    if memory is not None and name == "agem":
        made.plugins.append(AveragedGradient(memory, settings.batch_size))
    elif memory is not None:
        made.plugins.append(
            ReplayPlugin(
                mem_size=len(memory), batch_size_mem=settings.batch_size, storage_policy=StoredExamples(memory)
            )
        )
        if name == "der" and old_logits is not None:
            made.loss = _dark_experience(settings, experience, old_logits, made.added)
        elif name == "er_ace":
            made.loss = _asymmetric(experience)
    if settings.holds is not None:
        kind = {"ewc": ElasticWeights, "si": SynapticIntelligence, "mas": MemoryAware}[settings.holds]
        made.anchored = kind(settings, net, importances, anchors, made.added)
        made.plugins.append(made.anchored)
    if name == "lwf" and old_logits is not None:
        made.plugins.append(Distillation(settings, old_logits, made.added))
    return made


class FineTuning(SupervisedTemplate):  # type: ignore[misc]
    """Avalanche's supervised training, with a strategy's loss, whose optimizer steps once for several batches."""

    accumulate = 1
    loss_of: Loss

    def make_train_dataloader(self, **kwargs: Any) -> None:
        # Avalanche's own leaves the dataset's collate function out.
        self.dataloader = DataLoader(
            self.adapted_dataset,
            batch_size=self.train_mb_size,
            shuffle=True,
            collate_fn=self.adapted_dataset.collate_fn,
        )

    def criterion(self) -> Tensor:
        return self.loss_of(self.mb_output, self.mb_y, self.mbatch[2])

    def training_epoch(self, **kwargs: Any) -> None:
        batches = len(self.dataloader)
        for number, batch in enumerate(self.dataloader):
            if self._stop_training:
                break
            self.mbatch = batch
            self._unpack_minibatch()
            self._before_training_iteration(**kwargs)
            first = number - number % self.accumulate
            if number == first:
                self.optimizer.zero_grad()
            self.loss = self._make_empty_loss()
            self._before_forward(**kwargs)
            self.mb_output = self.forward()
            self._after_forward(**kwargs)
            self.loss += self.criterion()
            self._before_backward(**kwargs)
            (self.loss / min(self.accumulate, batches - first)).backward()
            self._after_backward(**kwargs)
            if number + 1 == min(first + self.accumulate, batches):
                self._before_update(**kwargs)
                self.optimizer_step()
                self._after_update(**kwargs)
            self._after_training_iteration(**kwargs)

    def optimizer_step(self) -> None:
        trained = [p for p in self.model.parameters() if p.grad is not None]
        nn.utils.clip_grad_norm_(trained, MAX_GRADIENT_NORM)
        self.optimizer.step()


class StoredExamples(ExemplarsBuffer):  # type: ignore[misc]
    """Replay memory whose members were chosen before the run, by the replay store's policy."""

    def __init__(self, examples: ClassificationDataset) -> None:
        super().__init__(max_size=len(examples))
        self.buffer = examples

    def post_adapt(self, agent_state: Any, exp: Any) -> None:
        """Nothing: the replay store decides who stays, not the training process."""

    def resize(self, strategy: Any, new_size: int) -> None:
        """Keep the first `new_size` examples."""
        self.max_size = new_size
        self.buffer = self.buffer.subset(list(range(min(new_size, len(self.buffer)))))


class Anchored(SupervisedPlugin):  # type: ignore[misc]
    """Holds each weight near where earlier runs left it, the harder the more important it was to them.

    The penalty is `penalty_weight` times the sum over the weights of importance times squared distance to the
    anchor: Kirkpatrick et al. 2017, equation 3, with one sum for all earlier runs, which fades (Schwarz et al.
    2018, section 4). What it was that made a weight important is a subclass's to say.

    Under LoRA it is the weight with its delta merged that is held: the deltas are other ones in each run.

    Args:
        net: its weights' names are those of `importances` and `anchors`, apart from what LoRA adds to them.
        importances: of earlier runs; after the run, with this one's.
        anchors: where earlier runs left these weights; after the run, where this one did.
        added: told of each batch's penalty.
    """

    def __init__(
        self, settings: FineTuneSettings, net: nn.Module, importances: Named, anchors: Named, added: list[float]
    ) -> None:
        super().__init__()
        device = next(net.parameters()).device
        self.importances = {name: value.to(device) for name, value in importances.items()}
        self.anchors = {name: value.to(device) for name, value in anchors.items()}
        self.weight = settings.penalty_weight
        self._decay = settings.importance_decay
        self._added = added

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        parts = [
            (self.importances[name] * (weight - self.anchors[name]).square()).sum()
            for name, weight in _merged_weights(strategy.model)
            if name in self.importances and weight.requires_grad
        ]
        if parts:
            penalty = self.weight * torch.stack(parts).sum()
            strategy.loss += penalty
            self._added.append(float(penalty.detach()))

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Add what mattered to this run, scaled to a mean of 1 over the weights that it trained.

        As they come, importances vanish as the training loss does: no one `penalty_weight` would be right for two
        runs or two strategies, and the run that fitted best would be protected least. Where they have vanished
        altogether, what is left of them is rounding, and the run counts for nothing.
        """
        found = {name: value for name, value in self.measure(strategy).items() if bool(value.any())}
        mean = sum(float(value.sum()) for value in found.values()) / max(1, sum(v.numel() for v in found.values()))
        kept = {name: self._decay * value for name, value in self.importances.items()}
        if mean > VANISHED:
            for name, value in found.items():
                kept[name] = kept.get(name, 0.0) + value / mean
        weights = dict(strategy.model.named_parameters())
        self.importances = kept
        self.anchors = {name: weights[name].detach().clone() for name in kept}

    def measure(self, strategy: Any) -> Named:
        """How much each weight mattered to this run; never negative."""
        raise NotImplementedError


class ElasticWeights(Anchored):
    """EWC: squared gradients of the loss, the diagonal of the empirical Fisher matrix (Kirkpatrick et al. 2017,
    "Overcoming catastrophic forgetting in neural networks", section 2)."""

    def measure(self, strategy: Any) -> Named:
        fisher = EWCPlugin(self.weight).compute_importances(
            strategy.model,
            nn.CrossEntropyLoss(),
            strategy.optimizer,
            strategy.experience.dataset,
            strategy.device,
            strategy.train_mb_size,
        )
        return {name: found.data for name, found in fisher.items()}


class MemoryAware(Anchored):
    """MAS: how far the squared length of the output moves with a weight, whatever the labels (Aljundi et al. 2018,
    "Memory Aware Synapses", section 4.1, by batches)."""

    def measure(self, strategy: Any) -> Named:
        return {name: found.data for name, found in MASPlugin()._get_importance(strategy).items()}


class SynapticIntelligence(Anchored):
    """SI: a weight's share in the fall of the loss along the way it took, over the square of how far it came
    (Zenke, Poole and Ganguli 2017, "Continual Learning Through Synaptic Intelligence", section 3, equations 3 to 5).

    The way is followed to the last update, also where the weights kept are those of an earlier epoch.
    """

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        weights = _trained(strategy.model)
        self._start = {name: weight.detach().clone() for name, weight in weights.items()}
        self._path = {name: torch.zeros_like(weight) for name, weight in weights.items()}

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        # Before gradients are clipped, and without the penalty: it is the data's loss whose fall is shared out.
        self._before: Named = {}
        self._slope: Named = {}
        for name, weight in _trained(strategy.model).items():
            if weight.grad is None:
                continue
            self._before[name] = weight.detach().clone()
            self._slope[name] = weight.grad.clone()
            if name in self.importances:
                pull = self.importances[name] * (self._before[name] - self.anchors[name])
                self._slope[name] -= 2 * self.weight * pull

    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        for name, weight in _trained(strategy.model).items():
            if name in self._before:
                self._path[name] -= self._slope[name] * (weight.detach() - self._before[name])

    def measure(self, strategy: Any) -> Named:
        moved = {
            name: (weight.detach() - self._start[name]).square() for name, weight in _trained(strategy.model).items()
        }
        # The damping of equation 5, as the mean of what it is added to: right for any learning rate.
        damping = sum(float(value.sum()) for value in moved.values()) / sum(v.numel() for v in moved.values())
        return {name: self._path[name].clamp(min=0) / (moved[name] + max(damping, 1e-30)) for name in moved}


class Distillation(LwFPlugin):  # type: ignore[misc]
    """LwF: on every example the new network should say of the old classes what the old one said (Li and Hoiem 2016,
    "Learning without Forgetting", section 3).

    What the old network says is known before the first update, for all rows. So no copy of it is kept, trained
    beside or asked again in each epoch.
    """

    def __init__(self, settings: FineTuneSettings, old_logits: Tensor, added: list[float]) -> None:
        super().__init__(settings.distillation_weight, settings.distillation_temperature)
        self.lwf.prev_model = old_logits.__getitem__
        self.lwf.prev_classes_by_task[0] = set(range(old_logits.shape[1]))
        self._added = added

    def before_backward(self, strategy: Any, **kwargs: Any) -> None:
        extra = self.lwf(strategy.mbatch[2], strategy.mb_output, strategy.model)
        strategy.loss += extra
        self._added.append(float(extra.detach()))

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Nothing: the next run's old network is the one that this run leaves."""


class AveragedGradient(AGEMPlugin):  # type: ignore[misc]
    """A-GEM: an update that would raise the loss on the memory is turned until it does not (Chaudhry et al. 2019,
    "Efficient Lifelong Learning with A-GEM", section 4, equation 11)."""

    def __init__(self, memory: ClassificationDataset, sample: int) -> None:
        super().__init__(patterns_per_experience=len(memory), sample_size=sample)
        self.buffers = [memory]
        self.buffer_dliter = iter(
            GroupBalancedInfiniteDataLoader(self.buffers, batch_size=sample, collate_fn=memory.collate_fn)
        )

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Nothing: Avalanche clears the gradients here, and so would undo the batches before this one."""

    def after_backward(self, strategy: Any, **kwargs: Any) -> None:
        """Nothing: the gradient is whole only at the update."""

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        whole = [(weight, weight.grad) for weight in strategy.model.parameters()]
        super().before_training_iteration(strategy, **kwargs)
        for weight, gradient in whole:
            weight.grad = gradient
        # Divided by in the projection: where the memory is learned its gradient vanishes, and NaN would be the update.
        if float(self.reference_gradients.square().sum()) > VANISHED:
            super().after_backward(strategy, **kwargs)

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Nothing: the replay store decides who stays."""


def merge_lora(module: nn.Module) -> None:
    """Add the deltas into the weights and put the plain layers back, so that what serves needs no peft."""
    for name, found in list(module.named_modules()):
        if isinstance(found, LoraLayer):
            found.merge()
            plain = found.get_base_layer()
            # The deltas trained this weight, so it is one of those whose importance is measured.
            plain.weight.requires_grad_(True)
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, plain)


def _dark_experience(settings: FineTuneSettings, experience: int, old_logits: Tensor, added: list[float]) -> Loss:
    """DER++: replayed examples are held to their labels and to what the old network said (Buzzega et al. 2020, "Dark
    Experience for General Continual Learning", section 3, equation 6).

    The paper keeps the logits of the moment in which an example came into its buffer. Here they are those of the
    network that the last run left: the store also keeps what no run has seen, and nothing of an example outlives
    its withdrawal. Columns of classes that came later have none, and are left out.
    """
    known = old_logits.shape[1]

    def loss(logits: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
        new = rows < experience
        total = nn.functional.cross_entropy(logits[new], targets[new])
        if bool(new.all()):
            return total
        total = total + settings.der_beta * nn.functional.cross_entropy(logits[~new], targets[~new])
        # What the old network said of a class that it did not know is only noise.
        answered = ~new & (targets < known)
        if bool(answered.any()):
            dark = nn.functional.mse_loss(logits[answered, :known], old_logits[rows[answered]])
            total = total + settings.der_alpha * dark
            added.append(settings.der_alpha * float(dark.detach()))
        return total

    return loss


def _asymmetric(experience: int) -> Loss:
    """ER-ACE: what is new competes only with the classes of its own batch, so that it does not push the old ones
    away; the memory, which holds the new examples too, compares all (Caccia et al. 2022, "New Insights on Reducing
    Abrupt Representation Change in Online Continual Learning", section 4)."""

    def loss(logits: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
        new = rows < experience
        absent = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
        absent[targets[new]] = False
        total = nn.functional.cross_entropy(logits[new].masked_fill(absent, float("-inf")), targets[new])
        if not bool(new.all()):
            total = (total + nn.functional.cross_entropy(logits[~new], targets[~new])) / 2
        return total

    return loss


def _trained(net: nn.Module) -> Named:
    return {name: weight for name, weight in net.named_parameters() if weight.requires_grad}


def _merged_weights(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each weight under the name that it has without LoRA, with its delta added where it has one."""
    adapted = {
        f"{name}.base_layer.weight": found for name, found in net.named_modules() if isinstance(found, LoraLayer)
    }
    for name, weight in net.named_parameters():
        if ".lora_" in name:
            continue
        if name in adapted:
            weight = weight + adapted[name].get_delta_weight(LORA)
        yield name.replace(".base_layer.", "."), weight
