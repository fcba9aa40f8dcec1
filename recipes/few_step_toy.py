"""Inverse distillation to few steps on a problem small enough to enumerate: what it can reach, and what it does reach.

Method: IDLM (arXiv 2602.19066) on two tokens and three positions, p(AAA) = p(BBB) = ½. Everything is an exact sum:
no sampling, no network, no data. It prints the total variation between what a sampler generates and the data, for
the exact teacher, the best sampler that reveals positions independently, and students trained by IDLM: with one table
for all steps, and with one for each step. A CPU, about a minute:

    python recipes/few_step_toy.py
"""


def main() -> None:
    from embedded.two_modes import show_two_modes

    show_two_modes()


if __name__ == "__main__":
    main()
