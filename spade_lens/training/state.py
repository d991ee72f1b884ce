"""All that changes while a module is trained, and how a checkpoint stores it."""

import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from spade_lens.training.plan import TrainPlan, make_optimisers

COLUMNS = ("update", "train_loss", "validation_loss", "learning_rate", "seconds")


class State:
    """All that changes while a module is trained."""

    def __init__(self, module: nn.Module, plan: TrainPlan) -> None:
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError(
                f"{type(module).__name__} has no parameter that requires a gradient; expected at "
                "least one to train."
            )
        stored = module.state_dict()
        self._buffers = {n: b for n, b in module.named_buffers() if n in stored}
        self._before: dict[str, Tensor] = {}
        self._plan = plan
        self.optimisers = make_optimisers(module, self.parameters, plan)
        self._highest = [group["lr"] for o in self.optimisers for group in o.param_groups]
        self.step, self._sum, self._count, self._seconds = 0, 0.0, 0, 0.0
        self.rows: list[tuple[float, ...]] = []
        self._best: dict[str, Tensor] = {}  # of the lowest validation loss, where it is waited for

    @property
    def stopped(self) -> bool:
        """Whether the validation loss has not fallen for as long as the plan waits."""
        patience = self._plan.patience
        return patience is not None and len(self.rows) - 1 - self._lowest() >= patience

    def _lowest(self) -> int:
        """The row of the lowest validation loss, the first of equals."""
        losses = [row[COLUMNS.index("validation_loss")] for row in self.rows]
        return losses.index(min(losses)) if losses else -1

    def begin(self) -> None:
        """Remember the buffers, which a run in training mode may change (batch norm)."""
        self._before = {name: buffer.clone() for name, buffer in self._buffers.items()}

    @torch.no_grad()
    def take_back(self) -> None:
        """Undo what the step that has begun did to the buffers."""
        for name, buffer in self._before.items():
            self._buffers[name].copy_(buffer)

    def update(self, loss: float, seconds: float) -> None:
        """Change the weights by their gradients."""
        began, factor = time.perf_counter(), self._plan.factor(self.step)
        groups = [group for optimiser in self.optimisers for group in optimiser.param_groups]
        for group, highest in zip(groups, self._highest, strict=True):
            group["lr"] = highest * factor
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self._sum, self._count = self._sum + loss, self._count + 1
        self._seconds += seconds + time.perf_counter() - began

    def add_row(self, validation: float) -> None:
        """Add a row to the history."""
        rate = self._plan.learning_rate * self._plan.factor(self.step - 1)
        mean = self._sum / self._count
        self.rows.append((float(self.step), mean, validation, rate, self._seconds))
        self._sum, self._count = 0.0, 0
        if self._plan.patience is not None and self._lowest() == len(self.rows) - 1:
            now: dict[str, Tensor] = {f"parameter/{n}": p for n, p in self.parameters.items()}
            now |= {f"buffer/{n}": b for n, b in self._buffers.items()}
            self._best = {name: tensor.detach().clone() for name, tensor in now.items()}

    @torch.no_grad()
    def take_best(self) -> None:
        """Become what had the lowest validation loss, where the plan waits for it."""
        for kind, own in (("parameter", self.parameters), ("buffer", self._buffers)):
            for name, tensor in own.items():
                if self._best:
                    tensor.copy_(self._best[f"{kind}/{name}"])

    def tensors(self) -> dict[str, Tensor]:
        """Return everything by name, as a checkpoint stores it: as it was before the step."""
        found: dict[str, Tensor] = {
            f"parameter/{n}": p.detach() for n, p in self.parameters.items()
        }
        found |= {f"buffer/{n}": b for n, b in self._before.items()}
        for k, optimiser in enumerate(self.optimisers):
            for index, values in optimiser.state_dict()["state"].items():
                for name, value in values.items():
                    found[f"optimiser/{k}/{index}/{name}"] = torch.as_tensor(value)
        sums = [self._sum, self._count, self._seconds]
        found |= {f"best/{name}": tensor for name, tensor in self._best.items()}
        return found | {
            "step": torch.tensor(self.step),
            "sums": torch.tensor(sums, dtype=torch.float64),
            "rows": torch.tensor(self.rows, dtype=torch.float64).reshape(-1, len(COLUMNS)),
        }

    @torch.no_grad()
    def put_back(self, saved: Mapping[str, Tensor]) -> None:
        """Become what was stored."""
        for kind, own in (("parameter", self.parameters), ("buffer", self._buffers)):
            for name, tensor in own.items():
                tensor.copy_(saved[f"{kind}/{name}"])
        for k, optimiser in enumerate(self.optimisers):
            states: dict[int, dict[str, Tensor]] = {}
            for key, value in saved.items():
                if key.startswith(f"optimiser/{k}/"):
                    _, _, index, name = key.split("/")
                    states.setdefault(int(index), {})[name] = value
            groups = optimiser.state_dict()["param_groups"]
            optimiser.load_state_dict({"state": states, "param_groups": groups})
        self.step = int(saved["step"])
        self._sum, count, self._seconds = saved["sums"].tolist()
        self._count = int(count)
        self.rows = [tuple(row) for row in saved["rows"].tolist()]
        best = "best/"
        self._best = {k.removeprefix(best): v for k, v in saved.items() if k.startswith(best)}
