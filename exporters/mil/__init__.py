"""Core ML's ML Program ("MIL") read and evaluated without Core ML: files, weights, program, operators, evaluator.

Core ML itself runs on Apple's systems only. These modules compute what a package says, in NumPy, so that the
numbers of a Core ML export can be checked on any machine. Nothing here is needed where Core ML runs, and nothing
here needs the rest of Keyfoundry but its errors and its quiet imports. Guide: docs/core-ml-evaluator.md.
"""
