"""Vision encoders that transformers lacks, and the model class that holds a swapped one. Loadable without the rest."""
