"""Pushing to the Hugging Face Hub and fetching from it."""


class Pusher:
    def __init__(self, run):
        pass

    def push(self, update, directory):
        pass

    def poll(self):
        pass

    def finish(self):
        pass


def check_hub(run):
    pass
