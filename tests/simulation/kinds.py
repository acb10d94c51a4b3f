"""Which kind of seed it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulation.engines import EngineScenario
from simulation.pipelines import PipelineScenario
from simulation.producers import ProducerScenario

if TYPE_CHECKING:
    from simulation.scenario import Scenario
    from simulation.world import World


def kind_of(world: World) -> type[Scenario]:
    drawn = world.rng.random()
    if drawn < 0.7:
        return PipelineScenario
    return ProducerScenario if drawn < 0.88 else EngineScenario
