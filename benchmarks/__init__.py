"""What measures, run by hand: `python -m benchmarks.NAME`. Processes begin as the commands' do, for
all sides that are compared.
"""

from vggfeat.start import settle

settle()
