"""Make tuning profiles as engine.tune does."""

from __future__ import annotations

from collections.abc import Sequence

from engine.runs.profile import (
    PROFILE_FORMAT,
    BestBeside,
    Machine,
    Sampled,
    Tried,
    TunedOptions,
    TuningProfile,
)


def profile_of(machine: Machine, knobs: TunedOptions, tried: Sequence[Tried] = ()) -> TuningProfile:
    return TuningProfile(
        format=PROFILE_FORMAT,
        knobs=knobs,
        verdict="the defaults stay",
        made="2031-05-17T06:00:00+00:00",
        sample=Sampled(rows=10, of=100, by_status={"ok": 10}),
        best_beside=BestBeside(of_defaults=()),
        tried=tuple(tried),
        load_average=(0.5, 0.5),
        machine=machine,
    )
