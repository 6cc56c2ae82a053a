def grams(
    data: int,
    groups: int,
    samples: int,
    positions: int,
    channels: int,
    sample_stride: int,
    position_stride: int,
    channel_stride: int,
    out: int,
    measures: int,
    threads: int,
    variant: int,
    /,
) -> None: ...
def variants() -> list[tuple[str, int]]: ...
