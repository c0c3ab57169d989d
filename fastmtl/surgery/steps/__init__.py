"""The four kinds of optimizer step: stacked (and kept), joint, replay, tensor scope."""
