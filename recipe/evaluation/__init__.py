"""The loss on text, samples, tasks. Imports nothing, so that commands answer a mistake before torch is there."""
