"""Train the small autoencoder of the emoji: `python src/fit_kl.py`; then `autoencoder=kl_emoji` uses it."""

from omegaconf import DictConfig

from ditune.cli import entry_point


@entry_point("fit_kl")
def main(cfg: DictConfig) -> None:
    from studies.kl_autoencoder import fit  # after the config is known to be right: it takes seconds

    fit(cfg)


if __name__ == "__main__":
    main()
