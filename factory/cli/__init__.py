"""The command line: ``keyfoundry``. Commands import what they need when they run, so that a device without the
factory's libraries can still validate its package.
"""
