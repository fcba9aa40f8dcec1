"""Inverse distillation to few steps on a problem small enough to enumerate: what it can reach, and what it does reach.

Method: IDLM (arXiv 2602.19066) on two tokens and three positions, p(AAA) = p(BBB) = ½. Everything is an exact sum:
no sampling, no network, no data. Printed is the total variation between what a sampler generates and the data, for
the exact teacher, the best sampler that reveals positions independently, and students trained by IDLM, without and
with a table of its own for each step. A CPU, about a minute:

    python recipes/few_step_toy.py
"""


def main() -> None:
    from embedded.two_modes import distances

    steps, shares, seeds = (1, 2, 3, 4), (0.01, 0.12, 0.16), (0, 1, 2)
    columns = [distances(num_steps, shares, seeds) for num_steps in steps]
    print("total variation to the data at 1 to 4 steps; IDLM: mean over three seeds (lowest to highest)")
    print("the number behind idlm is the uniform share of the data that its teacher is exact for\n")
    print(f"{'':>20}" + "".join(f"{number:>24}" for number in steps))
    for name in columns[0]:
        cells = []
        for column in columns:
            values = column[name]
            spread = f" ({min(values):.4f} to {max(values):.4f})" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.4f}{spread}")
        print(f"{name:>20}" + "".join(f"{cell:>26}" for cell in cells))


if __name__ == "__main__":
    main()
