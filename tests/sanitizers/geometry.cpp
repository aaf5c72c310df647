// The index arithmetic of regions.h on every small grid, against its description.
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "checks.h"
#include "geometry/regions.h"

namespace llava_st::tests {
namespace {

std::string to_text(Extent a) { return std::to_string(a.t) + "x" + std::to_string(a.h) + "x" + std::to_string(a.w); }

bool same(Extent a, Extent b) { return a.t == b.t && a.h == b.h && a.w == b.w; }

/// Calls `visit` for all places in a grid, in the order of their numbers.
template <class Visit>
void for_places(Extent grid, Visit visit) {
  for (int64_t t = 0; t < grid.t; ++t) {
    for (int64_t h = 0; h < grid.h; ++h) {
      for (int64_t w = 0; w < grid.w; ++w) visit(Extent{t, h, w});
    }
  }
}

void check_ceil_div() {
  for (int64_t a = 0; a < 50; ++a) {
    for (int64_t b = 1; b < 50; ++b) {
      const int64_t c = ceil_div(a, b);
      check(c * b >= a && (c == 0 || (c - 1) * b < a), "ceil_div rounds up");
    }
  }
  constexpr int64_t kLargest = std::numeric_limits<int64_t>::max();
  check(ceil_div(kLargest, 1) == kLargest && ceil_div(kLargest, 2) == kLargest / 2 + 1, "ceil_div of a large a");
  check(ceil_div(1, kLargest) == 1 && ceil_div(kLargest, kLargest) == 1, "ceil_div by a large b");
}

/// Every token belongs to one region, and a region is found by its number and by its place.
void check_regions(Extent grid, Extent region) {
  std::vector<int> owners(static_cast<size_t>(grid.count()));
  const Extent regions = regions_of(grid, region);
  int64_t index = 0;
  for_places(regions, [&](Extent at) {
    const Region found = region_at(grid, region, index++);
    const Region placed = region_at(grid, region, at);
    check(same(found.at, at) && same(placed.at, at), "region_at gives the place");
    check(same(found.first, placed.first) && same(found.size, placed.size), "region_at agrees with itself");
    check(same(found.first, {at.t * region.t, at.h * region.h, at.w * region.w}), "a region begins at its place");
    for_places(found.size, [&](Extent in) {
      const Extent token = {found.first.t + in.t, found.first.h + in.h, found.first.w + in.w};
      check(token.t < grid.t && token.h < grid.h && token.w < grid.w, "a region ends within the grid");
      ++owners.at(static_cast<size_t>((token.t * grid.h + token.h) * grid.w + token.w));
    });
  });
  check(index == regions.count(), "as many regions as regions_of says");
  for (const int count : owners) check(count == 1, "a token belongs to exactly one region");
}

void check_packed_strides(Extent grid) {
  constexpr int64_t kToken = 11, kHead = 5;
  const TokenStrides strides = packed_strides(grid, kToken, kHead);
  check(strides.sample == 0 && strides.head == kHead, "packed_strides keeps the head's and has one sample");
  int64_t number = 0;
  for_places(grid,
             [&](Extent at) { check(strides.offset(at) == kToken * number++, "packed tokens follow each other"); });
}

/// The video of every position, where videos have these numbers of keys and of queries, some none.
void check_videos(const std::vector<PackedOffset>& sizes) {
  const auto videos = static_cast<int64_t>(sizes.size());
  std::vector<PackedOffset> offsets(sizes.size() + 1);
  std::vector<int64_t> of_key, of_query;
  for (int64_t video = 0; video < videos; ++video) {
    const PackedOffset size = sizes[video];
    offsets[video + 1] = {offsets[video].key + size.key, offsets[video].query + size.query};
    of_key.insert(of_key.end(), static_cast<size_t>(size.key), video);
    of_query.insert(of_query.end(), static_cast<size_t>(size.query), video);
  }
  for (size_t at = 0; at < of_key.size(); ++at) {
    check(video_of_key(offsets.data(), videos, static_cast<int64_t>(at)) == of_key[at], "video_of_key");
  }
  for (size_t at = 0; at < of_query.size(); ++at) {
    check(video_of_query(offsets.data(), videos, static_cast<int64_t>(at)) == of_query[at], "video_of_query");
  }
}

/// All sequences of up to `more` further videos.
void check_all_videos(std::vector<PackedOffset>& sizes, int more) {
  check_videos(sizes);
  if (more == 0) return;
  for (const PackedOffset size : {PackedOffset{0, 0}, PackedOffset{1, 1}, PackedOffset{5, 2}}) {
    sizes.push_back(size);
    check_all_videos(sizes, more - 1);
    sizes.pop_back();
  }
}

}  // namespace

int64_t check_geometry() {
  int64_t checked = 0;
  current = "geometry";
  check_ceil_div();
  for_places({6, 6, 6}, [&](Extent grid) {
    check_packed_strides(grid);
    for_places({5, 5, 5}, [&](Extent least) {
      const Extent region = {least.t + 1, least.h + 1, least.w + 1};
      current = "geometry of grid " + to_text(grid) + " in regions " + to_text(region);
      check_regions(grid, region);
      ++checked;
    });
  });
  current = "geometry of packed videos";
  std::vector<PackedOffset> none;
  check_all_videos(none, 6);
  return checked;
}

}  // namespace llava_st::tests
