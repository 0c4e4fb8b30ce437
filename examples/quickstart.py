"""Ten lines without a model: ``python examples/quickstart.py``. With no Ray running, one is started here."""

import ray_shm


class Counter:
    """Any plain class is a worker class; every worker builds its own instance."""

    def __init__(self) -> None:
        self.value = ray_shm.get_context().rank

    def add(self, amount: int) -> int:
        self.value += amount
        return self.value


if __name__ == "__main__":
    with ray_shm.launch(Counter, num_workers=2) as actor:
        print(actor.collective_rpc("add", args=(2,)))  # to all ranks the same: [2, 3]
        print(actor.collective_rpc("add", args=(ray_shm.Scatter([10, 20]),)))  # to each its own: [12, 23]
        print(actor.collective_rpc(lambda counter: counter.value**2))  # a callable gets the worker: [144, 529]
