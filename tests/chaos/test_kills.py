"""Every long command, killed at random moments: nothing is lost, nothing is half, and the next run ends as if nothing
had been.
"""

import pytest
from chaos import Place, killed_again_and_again
from long_commands import COMMANDS, prepared


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return prepared(tmp_path_factory.mktemp("kills"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_random_moments(place: Place, name: str) -> None:
    command = COMMANDS[name]
    seconds = killed_again_and_again(place, command, place.root / name, command.kills, seed=11)
    print(f"{name}: {command.kills} kills within {seconds:.1f} s")


@pytest.mark.parametrize("name", ["prepare", "export"])
def test_killed_twice(place: Place, name: str) -> None:
    killed_again_and_again(place, COMMANDS[name], place.root / f"{name}-twice", kills=2, seed=1)
